"""What tells one disk from another, whatever path led to it; which other disks it is a part of, or made of.

Called in the worker by whoever opens or compares disks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import NamedTuple

SYS_DEV_BLOCK = Path("/sys/dev/block")
LOOP_GET_STATUS64 = 0x4C05  # linux/loop.h
LOOP_INFO64_SIZE = (
    232  # bytes of struct loop_info64: st_dev, st_ino, st_rdev of the file, offset, limit, ...
)


def key_of(fd: int) -> str:
    return key_of_status(os.fstat(fd))


def key_of_status(status: os.stat_result) -> str:
    if stat.S_ISBLK(status.st_mode):
        return f"block:{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return f"file:{status.st_dev}:{status.st_ino}"


def relatives_of(fd: int, devices: Path = SYS_DEV_BLOCK) -> set[str]:
    """Keys of the disks that have bytes in common with this one: of a disk its partitions, of a partition
    its disk, of a loop device or its partition what it is made of, and that one's relatives.
    """
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return set()
    found = _find_parts(_device(status.st_rdev, devices))
    backing = _ask_backing(fd)
    if backing is None:
        return found
    parts = _find_parts(_device(backing.number, devices)) if backing.number else set()
    return found | {backing.key} | parts


def backing_of(fd: int, devices: Path = SYS_DEV_BLOCK) -> str:
    """The key of the file or device that a loop device is made of; "" for anything else, and for what has
    only a part of it: a partition, or an offset or limit of its own.
    """
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode) or (_device(status.st_rdev, devices) / "partition").exists():
        return ""
    backing = _ask_backing(fd)
    return "" if backing is None or backing.is_part else backing.key


def _device(number: int, devices: Path) -> Path:
    return devices / f"{os.major(number)}:{os.minor(number)}"


def _find_parts(device: Path) -> set[str]:
    found: set[str] = set()
    with contextlib.suppress(OSError):
        found.update(_read_key(partition.parent) for partition in device.glob("*/partition"))
    with contextlib.suppress(OSError):
        if (device / "partition").exists():
            found.add(_read_key(device / ".."))
    return found


class _Backing(NamedTuple):
    """Of a loop device, or the one that a partition is on; `number` is that of a device, 0 of a file's."""

    key: str
    number: int
    is_part: bool


def _ask_backing(fd: int) -> _Backing | None:
    info = bytearray(LOOP_INFO64_SIZE)
    try:
        fcntl.ioctl(fd, LOOP_GET_STATUS64, info)
    except OSError:
        return None
    device, inode, number, offset, limit = struct.unpack_from("=QQQQQ", info)
    key = f"block:{os.major(number)}:{os.minor(number)}" if number else f"file:{device}:{inode}"
    return _Backing(key, number, bool(offset or limit))


def _read_key(device: Path) -> str:
    return f"block:{(device / 'dev').read_text().strip()}"
