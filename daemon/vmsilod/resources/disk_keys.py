"""What tells one disk from another, whatever path led to it; which other disks it is a part of, or made of.

Called in the worker by whoever opens or compares disks. Loop devices are asked by ioctl: the path that sysfs
shows for their file is its owner's to change.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from vmsilod.errors import StartFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

SYS_BLOCK = Path("/sys/block")
SYS_DEV_BLOCK = Path("/sys/dev/block")
DEV = Path("/dev")
LOOP_GET_STATUS64 = 0x4C05  # linux/loop.h
LOOP_INFO64_SIZE = 232  # bytes of struct loop_info64, which begins with the file's st_dev and st_ino


def key_of(fd: int) -> str:
    return key_of_status(os.fstat(fd))


def key_of_status(status: os.stat_result) -> str:
    if stat.S_ISBLK(status.st_mode):
        return f"block:{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return f"file:{status.st_dev}:{status.st_ino}"


def relatives_of(fd: int, devices: Path = SYS_DEV_BLOCK) -> set[str]:
    """Keys of the disks that have bytes in common with this one: of a disk its partitions, of a partition
    its disk, of a loop device or its partition the file.
    """
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return set()
    device = devices / f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    found: set[str] = set()
    with contextlib.suppress(OSError):
        found.update(_read_key(partition.parent) for partition in device.glob("*/partition"))
    with contextlib.suppress(OSError):
        if (device / "partition").exists():
            found.add(_read_key(device / ".."))
    file = find_loop_file(fd)
    return found | ({file} if file else set())


def find_loop_file(fd: int) -> str:
    """The key of the file that a loop device is made of, or a partition of one; "" for anything else."""
    info = bytearray(LOOP_INFO64_SIZE)
    try:
        fcntl.ioctl(fd, LOOP_GET_STATUS64, info)
    except OSError:
        return ""
    device, inode = struct.unpack_from("=QQ", info)
    return f"file:{device}:{inode}"


def refuse_loop_device(fd: int, title: str, *, writable: bool) -> None:
    """A file that the host uses through a loop device, which holds no lock on it, may not change twice."""
    key = key_of(fd)
    for name, file, reader in _find_loops():
        if file == key and (writable or not reader):
            raise StartFailed(
                f"{title} is in use by the host as /dev/{name}", f"umount it, or losetup -d /dev/{name}"
            )


def _find_loops() -> Iterator[tuple[str, str, bool]]:
    """Of each that has a file: its name, the file's key, whether it is read-only."""
    for entry in SYS_BLOCK.glob("loop*/loop"):
        device = entry.parent
        try:
            fd = os.open(DEV / device.name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue  # it goes
        try:
            if key_of(fd) == _read_key(device) and (file := find_loop_file(fd)):
                yield device.name, file, (device / "ro").read_text() == "1\n"
        except OSError:
            continue
        finally:
            os.close(fd)


def _read_key(device: Path) -> str:
    return f"block:{(device / 'dev').read_text().strip()}"
