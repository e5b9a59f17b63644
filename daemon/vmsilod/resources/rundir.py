"""Per-VM run-time directory /run/vmsilo/vm/NAME: the monitor socket, and the hybrid vsock sockets in a
folder of their own.

Called in the worker by the lifecycle. The directory itself belongs to root; only `vsock/` can be written by
the VM's uid, so nothing that root opens below can be replaced by a VMM that was taken over.
"""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from vmsilod.errors import Failed

VM_DIR = Path("/run/vmsilo/vm")
BACKLOG = 64


def create_rundir(name: str, root: Path = VM_DIR) -> Path:
    """A fresh empty directory; what an earlier run left is removed."""
    path = root / name
    remove_rundir(name, root)
    try:
        root.mkdir(mode=0o711, parents=True, exist_ok=True)
        path.mkdir()
        path.chmod(0o711)  # whatever the umask: the vsock device and the relay pass through
    except OSError as error:
        raise Failed(f"cannot create {path}: {error.strerror}") from error
    return path


def remove_rundir(name: str, root: Path = VM_DIR) -> None:
    # rmtree follows no symbolic link, whatever the VM's uid put below vsock/.
    if shutil.rmtree.avoids_symlink_attacks:
        shutil.rmtree(root / name, ignore_errors=True)


def create_vsock_dir(rundir: Path, uid: int, relay_gid: int) -> Path:
    """The folder that the vsock device (the VM's uid) and the relay (its group) share: 0770, nobody else
    enters.
    """
    path = rundir / "vsock"
    path.mkdir(mode=0o700)
    os.chown(path, uid, relay_gid)
    path.chmod(0o770)
    return path


def bind_listener(path: Path, kind: socket.SocketKind, mode: int, owner: tuple[int, int] = (0, 0)) -> int:
    """A listening Unix socket of the given mode and owner; the caller owns the descriptor."""
    with socket.socket(socket.AF_UNIX, kind) as sock:
        try:
            previous = os.umask(0o777)
            try:
                sock.bind(str(path))
            finally:
                os.umask(previous)
            os.chown(path, *owner)
            path.chmod(mode)
            sock.listen(BACKLOG)
        except OSError as error:
            raise Failed(f"cannot listen on {path}: {error.strerror}") from error
        return sock.detach()
