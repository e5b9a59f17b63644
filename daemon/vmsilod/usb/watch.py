"""Says when a USB device came, went, or got a driver: the kernel's own events over netlink.

Owned by main. Nothing is taken from an event but that there was one of USB: whoever is told looks at sysfs.
Events that come close together are reported once, some tenths of a second later, when the kernel has made
the device's interfaces; lost ones (a full queue) count as an event. The node below /dev/bus/usb would be too
early a sign: it is there before the interfaces.
"""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING

from gi.repository import GLib

from vmsilod import loop
from vmsilod.events import drain

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

NETLINK_KOBJECT_UEVENT = 15
KERNEL_GROUP = 1
SETTLE_SECONDS = 0.3


class UsbWatch:
    """Calls on_change() until close()."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._timer = 0
        self._socket: socket.socket | None = None
        try:
            self._socket = open_uevents()
        except OSError as error:
            log.warning("USB devices are not seen coming and going: %s", error.strerror)
            return
        self._watch = loop.watch_fd(self._socket.fileno(), self._read)

    def close(self) -> None:
        if self._socket is not None:
            GLib.source_remove(self._watch)
            self._socket.close()
            self._socket = None
        if self._timer:
            GLib.source_remove(self._timer)
            self._timer = 0

    def _read(self) -> None:
        assert self._socket is not None
        if drain(self._socket, is_usb) and not self._timer:
            self._timer = loop.call_later(SETTLE_SECONDS, self._fire)

    def _fire(self) -> None:
        self._timer = 0
        self._on_change()


def open_uevents() -> socket.socket:
    sock = socket.socket(
        socket.AF_NETLINK,
        socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
        NETLINK_KOBJECT_UEVENT,
    )
    try:
        sock.bind((0, KERNEL_GROUP))
    except OSError:
        sock.close()
        raise
    return sock


def is_usb(untrusted_event: bytes) -> bool:
    """`ACTION@DEVPATH`, then KEY=VALUE, each ended by a zero byte."""
    return b"SUBSYSTEM=usb" in untrusted_event.split(b"\0")
