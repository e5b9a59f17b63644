"""Per-VM run-time directory /run/vmsilo/vm/NAME: the monitor socket, and the hybrid vsock sockets in a
folder of their own.

Called in the worker by the lifecycle. The directory itself belongs to root; only `vsock/` can be written by
the VM's uid, so nothing that root opens below can be replaced by a VMM that was taken over.
"""

from __future__ import annotations

import os
import socket
import subprocess
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
    """What is below vsock/ was made by the VM's uid: rm(1) follows no link and takes any depth, which
    shutil.rmtree of Python 3.11 does not (it recurses).
    """
    path = root / name
    if not path.exists():
        return
    argv = ["/usr/bin/rm", "-rf", "--one-file-system", "--", str(path)]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, env={}, check=False)
    if done.returncode:
        raise Failed(f"cannot remove {path}: {done.stderr[:200].decode(errors='replace').strip()}")


def create_vsock_dir(rundir: Path) -> Path:
    path = rundir / "vsock"
    path.mkdir(mode=0o700)
    return path


def hand_over_vsock_dir(path: Path, uid: int, relay_gid: int) -> None:
    """From here on the vsock device (the VM's uid) and the relay (its group) share the folder, and nobody
    else enters; nothing in it is touched by root any more.
    """
    os.chown(path, uid, relay_gid)
    path.chmod(0o770)


def bind_listener(path: Path, kind: socket.SocketKind, mode: int, owner: tuple[int, int] = (0, 0)) -> int:
    """A listening Unix socket of the given mode and owner; the caller owns the descriptor."""
    with socket.socket(socket.AF_UNIX, kind) as sock:
        try:
            # Nobody else can enter the directory yet, or the daemon's umask (0077) keeps them out: so the
            # order
            # of these three does not matter.
            sock.bind(str(path))
            os.chown(path, *owner, follow_symlinks=False)
            path.chmod(mode)
            sock.listen(BACKLOG)
        except OSError as error:
            raise Failed(f"cannot listen on {path}: {error.strerror}") from error
        return sock.detach()
