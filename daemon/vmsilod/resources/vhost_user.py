"""The sockets of vhost-user backends that the configuration names, as descriptors for the VMM.

Called in the worker by the preparation. The VM's uid may usually not connect to such a socket, so vmsilod
does it for a VMM that takes a connected descriptor. One that connects by itself gets the socket's inode
(O_PATH): then no directory on the way matters, only the mode of the socket itself, which is checked here,
because a VMM says no more than "permission denied". The caller owns the descriptors.
"""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from vmsilod.errors import StartFailed
from vmsilod.resources.paths import open_safely

CONNECT_SECONDS = 5.0
ACL = "system.posix_acl_access"


@dataclass(frozen=True)
class Account:
    """Who the VMM runs as."""

    uid: int
    groups: frozenset[int]


def connect_socket(path: Path) -> int:
    """A connection to the backend that listens at `path`."""
    place = open_socket(path)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(CONNECT_SECONDS)
            try:
                sock.connect(f"/proc/self/fd/{place}")
            except TimeoutError as error:
                raise StartFailed(f"the vhost-user backend at {path} takes no connection") from error
            except OSError as error:
                raise StartFailed(
                    f"no vhost-user backend listens at {path}: {error.strerror}",
                    "start it before the VM; most backends serve one VM and then end",
                ) from error
            sock.settimeout(None)
            return sock.detach()
    finally:
        os.close(place)


def open_socket(path: Path) -> int:
    """The socket's inode, connected to by nobody."""
    place = open_safely(path, os.O_PATH)
    if not stat.S_ISSOCK(os.fstat(place).st_mode):
        os.close(place)
        raise StartFailed(f"{path} is not a socket", "vhost_user names the socket of a running backend")
    return place


def may_access(fd: int, account: Account, wanted: int) -> bool:
    """Whether the file's mode gives `account` all of `wanted` (4 read, 2 write).

    Where the file has an access control list the answer is yes: the kernel will know.
    """
    status = os.fstat(fd)
    if status.st_uid == account.uid:
        given = status.st_mode >> 6
    elif status.st_gid in account.groups:
        given = status.st_mode >> 3
    else:
        given = status.st_mode
    return given & wanted == wanted or _has_acl(fd)


def require_socket_access(path: Path, fd: int, account: Account) -> None:
    if not may_access(fd, account, 2):
        raise StartFailed(
            f"the VM's own user (uid {account.uid}) may not connect to {path}, and cloud-hypervisor connects"
            " by itself",
            f"chmod 0666 {path}, in a directory that nobody else may enter (0700)",
        )


def require_disk_access(path: Path, fd: int, account: Account, *, writable: bool) -> None:
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        raise StartFailed(
            f"{path} is a block device, and cloud-hypervisor opens its disks itself, which its unit forbids"
            " for devices",
            'use vmm = "crosvm" or "qemu", which take an open disk',
        )
    if not may_access(fd, account, 6 if writable else 4):
        verb = "write" if writable else "read"
        raise StartFailed(
            f"the VM's own user (uid {account.uid}) may not {verb} {path}, and cloud-hypervisor opens it by"
            " itself",
            f"chmod {'0666' if writable else '0644'}, in a directory that nobody else may enter (0700);"
            ' or vmm = "crosvm" or "qemu"',
        )


def find_groups(pid: int, gid: int, proc: Path = Path("/proc")) -> frozenset[int]:
    """The groups of the process that will be the VMM, with its first one."""
    try:
        lines = (proc / str(pid) / "status").read_text().splitlines()
    except OSError as error:
        raise StartFailed(f"process {pid} is gone: {error.strerror}") from error
    words = next((line.split()[1:] for line in lines if line.startswith("Groups:")), [])
    return frozenset({gid, *(int(word) for word in words)})


def _has_acl(fd: int) -> bool:
    try:
        return bool(os.getxattr(f"/proc/self/fd/{fd}", ACL))
    except OSError:
        return False
