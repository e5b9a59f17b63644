"""Network interfaces of a running QEMU: the QMP commands for them, on a session that qmp.py has opened.

The queues travel as descriptors: QEMU's own uid may open none. Only a q35 machine that was started with an
interface has ports to plug one into.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vmsilod.vmm.errors import MonitorError, MonitorGarbled, MonitorRefused
from vmsilod.vmm.net import PORT_ID, describe_qemu_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmsilod.vmm.launch import NetDevice
    from vmsilod.vmm.qmp_usb import Session

_PERIPHERALS = "/machine/peripheral"


def attach(session: Session, net: NetDevice) -> None:
    port = _find_port(session)
    _add_netdev(session, net)
    try:
        session.execute("device_add", describe_qemu_device(net, port))
    except MonitorRefused:
        session.execute("netdev_del", {"id": net.id})
        raise


def detach(session: Session, device: str) -> None:
    _list_ports(session)  # a machine without them would only cut the link off, and keep the device
    with _tolerated():
        # At once, whatever the guest does: it can take its time to give the device up, or never do so.
        session.execute("set_link", {"name": device, "up": False})
    with _tolerated():
        session.execute("device_del", {"id": device})
        session.await_deleted(device)
    with _tolerated():
        session.execute("netdev_del", {"id": device})


def _add_netdev(session: Session, net: NetDevice) -> None:
    names = [f"{net.id}-{number}" for number in range(len(net.fds))]
    taps, vhosts = names[: len(net.tap_fds)], names[len(net.tap_fds) :]
    netdev: dict[str, str | bool] = {"type": "tap", "id": net.id, "fds": ":".join(taps)}
    if vhosts:
        netdev |= {"vhost": True, "vhostfds": ":".join(vhosts)}
    try:
        for name, fd in zip(names, net.fds, strict=True):
            session.execute("getfd", {"fdname": name}, [fd])
        session.execute("netdev_add", netdev)
    except MonitorRefused:
        for name in names:
            # What netdev_add took is closed already; what it left would keep the TAP's queue.
            with contextlib.suppress(MonitorError):
                session.execute("closefd", {"fdname": name})
        raise


def _find_port(session: Session) -> str:
    for port in _list_ports(session):
        if not any(name.startswith("child[") for name in _list(session, f"{_PERIPHERALS}/{port}/{port}")):
            return port
    raise MonitorRefused("no port of the VM is left for another network interface")


def _list_ports(session: Session) -> list[str]:
    ports = [name for name in _list(session, _PERIPHERALS) if name.startswith(PORT_ID)]
    if ports:
        return ports
    raise MonitorRefused(
        "QEMU has no port for a network interface",
        'a VM that was started with one and with machine = "q35" has some',
    )


def _list(session: Session, path: str) -> list[str]:
    listed = session.execute("qom-list", {"path": path})
    if not isinstance(listed, list):
        raise MonitorGarbled("QEMU did not list its devices")
    names = [entry.get("name") for entry in listed if isinstance(entry, dict)]
    return [name for name in names if isinstance(name, str)]


@contextlib.contextmanager
def _tolerated() -> Iterator[None]:
    """What is gone already need not go."""
    try:
        yield
    except MonitorRefused as error:
        if error.reason != "DeviceNotFound":
            raise
