"""What speaks against giving a device to a VM: disks behind it that this host uses.

Called in the worker before a device is handed over; changes nothing. The kernel is asked itself, by an
exclusive open: it knows of mounts in every namespace, swap, and the devices above (dm-crypt, LVM, RAID).
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vmsilod.usb.devices import SYSFS

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmsilod.usb.devices import UsbDevice

MOUNTINFO = Path("/proc/self/mountinfo")
SWAPS = Path("/proc/swaps")


def find_obstacles(
    device: UsbDevice, sysfs: Path = SYSFS, is_claimed: Callable[[Path], bool] | None = None
) -> list[str]:
    """Facts, for people; none means that the device may go."""
    is_claimed = is_claimed or is_block_claimed
    found = []
    for disk in find_blocks(device, sysfs):
        node = Path("/dev") / disk.name
        if not any(is_claimed(Path("/dev") / part) for part in _find_parts(disk)):
            continue
        found.append(f"the host uses {node}{_describe_use(disk)}")
    return found


def find_blocks(device: UsbDevice, sysfs: Path = SYSFS) -> list[Path]:
    """The disks behind a device: .../1-2:1.0/host6/target6:0:0/6:0:0:0/block/sdb."""
    root = sysfs / "bus" / "usb" / "devices" / device.name
    disks: list[Path] = []
    for interface in device.interfaces:
        for folder, names, _ in os.walk(root / interface.name):
            if Path(folder).name == "block":
                disks += [Path(folder) / name for name in sorted(names)]
                names.clear()
    return disks


def _find_parts(disk: Path) -> list[str]:
    parts = [path.parent.name for path in disk.glob(f"{disk.name}*/partition")]
    return [disk.name, *sorted(parts)]


def is_block_claimed(node: Path) -> bool:
    """Whether something in the kernel holds this block device for itself (open(2): O_EXCL)."""
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY  # no medium, gone: not in use
    return False


def _describe_use(disk: Path) -> str:
    """Where, as far as this process can see."""
    names = _find_parts(disk)
    numbers = {_read(disk / "dev"), *(_read(disk / name / "dev") for name in names[1:])} - {""}
    for line in _read(MOUNTINFO).splitlines():
        fields = line.split(" ")
        if len(fields) > 4 and fields[2] in numbers:
            return f": it is mounted on {fields[4]}"
    if any(line.split(" ")[0].removeprefix("/dev/") in names for line in _read(SWAPS).splitlines()):
        return ": it is swap space"
    for name in names:
        folder = disk / name / "holders" if name != disk.name else disk / "holders"
        if folder.is_dir() and (holders := sorted(path.name for path in folder.iterdir())):
            return f": it is a part of {holders[0]}"
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
