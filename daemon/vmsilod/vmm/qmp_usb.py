"""Host USB devices in a running QEMU: the QMP commands for them, on a session that qmp.py has opened.

The device's node is opened by vmsilod and travels as a descriptor: QEMU's own uid may open none.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol

from vmsilod.vmm.errors import MonitorError, MonitorGarbled, MonitorRefused
from vmsilod.vmm.monitor import AttachedUsb

if TYPE_CHECKING:
    from collections.abc import Sequence

USB_ID = "usb"
"""The xHCI controller's id; its bus is `usb.0`."""
PREFIX = "usbhost-"
_PERIPHERALS = "/machine/peripheral"
_LISTED_MAX = 64


class Session(Protocol):
    def execute(
        self, command: str, arguments: dict[str, Any] | None = None, fds: Sequence[int] = ()
    ) -> Any: ...

    def await_deleted(self, device: str) -> None: ...


def attach(session: Session, fd: int, label: str) -> str:
    added = session.execute("add-fd", {"opaque": label}, [fd])
    number = added.get("fdset-id") if isinstance(added, dict) else None
    if not isinstance(number, int):
        raise MonitorGarbled("QEMU did not say under which number it took a descriptor")
    handle = PREFIX + label
    device = {
        "driver": "usb-host",
        "id": handle,
        "bus": f"{USB_ID}.0",
        "hostdevice": f"/dev/fdset/{number}",
    }
    try:
        session.execute("device_add", device)
    finally:
        # The device has a duplicate. Without this the node would stay open after the device is gone.
        with contextlib.suppress(MonitorError):
            session.execute("remove-fd", {"fdset-id": number})
    return handle


def detach(session: Session, handle: str) -> None:
    try:
        session.execute("device_del", {"id": handle})
    except MonitorRefused as error:
        if error.reason == "DeviceNotFound":
            return
        raise
    session.await_deleted(handle)


def list_attached(session: Session) -> list[AttachedUsb]:
    listed = session.execute("qom-list", {"path": _PERIPHERALS})
    if not isinstance(listed, list):
        raise MonitorGarbled("QEMU did not list its devices")
    names = [entry.get("name") for entry in listed if isinstance(entry, dict)]
    ours = [name for name in names if isinstance(name, str) and name.startswith(PREFIX)]
    return [AttachedUsb(name, label=name.removeprefix(PREFIX)) for name in ours[:_LISTED_MAX]]
