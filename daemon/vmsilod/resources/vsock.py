"""The channel between host and guest: a kernel vsock CID, or hybrid vsock where the kernel has no
vhost-vsock.

Called in the worker by the lifecycle. CIDs come from a counter that only grows during one boot and are
reserved by setting them on the vhost-vsock descriptor that the VMM gets: as long as the VMM lives nobody
else can take its CID.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import struct
import threading
from pathlib import Path

from vmsilod.errors import Failed

VHOST_VSOCK = Path("/dev/vhost-vsock")
VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60  # _IOW(0xAF, 0x60, __u64), linux/vhost.h
HYBRID_DEVICE = "vhost-device-vsock"
HYBRID_CID = 3  # each hybrid guest has a vsock world of its own, so the number needs not be unique
FIRST_CID = 1000  # out of the way of the low numbers that people give to VMs by hand
LAST_CID = 0x7FFF_FFFF
_counting = threading.Lock()  # two starts may be in two workers
HOST_PORT = 701  # below 1024: only a privileged process of the host can listen there


def has_kernel_vsock(device: Path = VHOST_VSOCK) -> bool:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def find_hybrid_device() -> str | None:
    return shutil.which(HYBRID_DEVICE, path="/usr/local/bin:/usr/bin:/usr/libexec:/usr/lib/vmsilo")


def acquire_kernel_cid(counter: Path, device: Path = VHOST_VSOCK) -> tuple[int, int]:
    """(CID, vhost-vsock descriptor that holds it); the caller owns the descriptor. CIDs in use elsewhere
    are passed over.
    """
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Failed(f"cannot open {device}: {error.strerror}", "modprobe vhost_vsock") from error
    try:
        cid = next_cid(counter)
        while not _take_cid(fd, cid):
            cid = next_cid(counter)
    except BaseException:
        os.close(fd)
        raise
    return cid, fd


def next_cid(counter: Path) -> int:
    """The next number of the boot; kept in a file in /run so that a restarted daemon goes on counting."""
    with _counting:
        try:
            last = int(counter.read_text())
        except (FileNotFoundError, ValueError):
            last = FIRST_CID - 1
        cid = last + 1
        if cid > LAST_CID:
            raise Failed("no vsock CID is left in this boot", "reboot the host")
        counter.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = counter.with_suffix(".new")
        temporary.write_text(str(cid))
        temporary.rename(counter)
        return cid


def _take_cid(fd: int, cid: int) -> bool:
    try:
        fcntl.ioctl(fd, VHOST_VSOCK_SET_GUEST_CID, struct.pack("Q", cid))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        raise Failed(f"vhost-vsock refused CID {cid}: {error.strerror}") from error
    return True


def bind_host_port(port: int = HOST_PORT) -> int:
    """The listening AF_VSOCK socket for what guests report; the caller owns the descriptor."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
        try:
            sock.bind((socket.VMADDR_CID_ANY, port))
            sock.listen(128)
        except OSError as error:
            raise Failed(f"cannot listen on vsock port {port}: {error.strerror}") from error
        return sock.detach()
