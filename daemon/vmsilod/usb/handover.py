"""A device's way out of the host: host drivers off, its node opened, and the descriptor checked to be of the
very device that was meant.

Called in the worker by the attachments; the caller owns the descriptor. When the last descriptor is closed
the kernel leaves the interfaces without a driver: nobody but `give_to_host` lets the host's drivers look at
a device again that a VM has had.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from vmsilod.errors import Busy, Failed
from vmsilod.usb.devices import SYSFS, find_device, node_of

if TYPE_CHECKING:
    from vmsilod.usb.devices import UsbDevice, UsbInterface

log = logging.getLogger(__name__)

USB_DEVICE_MAJOR = 189
DEVICES_PER_BUS = 128
# _IOW('U', 30, __u32) in linux/usbdevice_fs.h. From then on this descriptor cannot bind or unbind host
# drivers.
USBDEVFS_DROP_PRIVILEGES = 0x4004551E
_EVERY_INTERFACE = 0xFFFFFFFF


def open_device(device: UsbDevice, dev: Path = Path("/dev"), sysfs: Path = SYSFS) -> int:
    """Open its node for reading and writing. Busy if another device has come in its place meanwhile."""
    path = node_of(device, dev)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            raise _gone(device) from error
        raise Failed(f"cannot open {path}: {error.strerror}") from error
    try:
        check_node(os.fstat(fd), device, path)
        # Opened first, then looked at: the descriptor stays with its device, whatever gets its numbers
        # later.
        now = find_device(device.name, sysfs)
        if now is None or (now.key, now.ids) != (device.key, device.ids):
            raise _gone(device)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_node(status: os.stat_result, device: UsbDevice, path: Path) -> None:
    minor = (device.busnum - 1) * DEVICES_PER_BUS + device.devnum - 1
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != os.makedev(USB_DEVICE_MAJOR, minor):
        raise Failed(f"{path} is not the node of USB device {device.name}")


def _gone(device: UsbDevice) -> Busy:
    return Busy(f"USB device {device.name} was unplugged just now", "vmsilo usb list")


def take_from_host(device: UsbDevice, sysfs: Path = SYSFS) -> None:
    """Unbind the host's drivers. What a program of the host holds (usbfs) is not taken away from it."""
    for interface in device.interfaces:
        if interface.driver == "usbfs":
            raise Busy(f"a program of the host uses USB device {device.name}", "end it first")
    for interface in device.interfaces:
        if interface.driver:
            _unbind(interface, sysfs)


def keep_from_host(device: UsbDevice, sysfs: Path = SYSFS) -> None:
    """Unbind host drivers that took interfaces of a device that a VM has. Those of usbfs are the VMM's."""
    for interface in device.interfaces:
        if interface.driver in ("", "usbfs"):
            continue
        try:
            _unbind(interface, sysfs)
        except Failed as error:
            log.warning("the host's driver keeps a part of a device that a VM has: %s", error)


def give_to_host(device: UsbDevice, sysfs: Path = SYSFS) -> None:
    """Let the host's drivers look at every interface that has none."""
    for interface in device.interfaces:
        if not interface.driver:
            _write(sysfs / "bus" / "usb" / "drivers_probe", interface.name, gone_is_done=False)


def drop_privileges(fd: int) -> None:
    """For a VMM that binds the host's drivers again when it lets go of a device: then it can't."""
    try:
        fcntl.ioctl(fd, USBDEVFS_DROP_PRIVILEGES, struct.pack("=I", _EVERY_INTERFACE))
    except OSError as error:
        raise Failed(f"the kernel does not restrict a USB descriptor: {error.strerror}") from error


def _unbind(interface: UsbInterface, sysfs: Path) -> None:
    path = sysfs / "bus" / "usb" / "devices" / interface.name / "driver" / "unbind"
    _write(path, interface.name, gone_is_done=True)


def _write(path: Path, text: str, *, gone_is_done: bool) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        if gone_is_done and error.errno in (errno.ENOENT, errno.ENODEV):
            return  # unbound by somebody else in this moment
        raise Failed(f"cannot write {text} to {path}: {error.strerror}") from error
