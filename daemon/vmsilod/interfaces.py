"""The network interfaces of one VM start: TAPs open, with vhost-net where this host has it.

Called by runs. What is opened belongs to whoever holds the Interfaces; the pool is told of the VM's end by
itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmsilod import loop
from vmsilod.errors import StartFailed
from vmsilod.network.stand_ins import place_stand_ins
from vmsilod.vmm.choose import VmmKind
from vmsilod.vmm.drivers import DRIVERS
from vmsilod.vmm.launch import NetDevice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsilod.network.plan import Port
    from vmsilod.network.pool import NetworkPool, OpenPort

VHOST_NET = Path("/dev/vhost-net")


@dataclass(frozen=True)
class Interfaces:
    """In the order of the VM's configuration; none for an offline VM."""

    ports: tuple[Port, ...] = ()
    nets: tuple[NetDevice, ...] = ()

    def fds(self) -> list[int]:
        return [fd for net in self.nets for fd in net.fds]


async def open_interfaces(pool: NetworkPool, vm: str, kind: VmmKind, launcher: int) -> Interfaces:
    """`launcher` is the process that becomes the VMM. Raises StartFailed, and then nothing is open."""
    opened = await pool.open(vm)
    if not opened:
        return Interfaces()
    try:
        # Of the VMMs only QEMU takes vhost-net's descriptors: crosvm opens it by itself.
        vhost = [await loop.in_worker(open_vhost, each) if kind is VmmKind.QEMU else () for each in opened]
    except BaseException:
        for fd in (fd for each in opened for fd in each.tap_fds):
            os.close(fd)
        raise
    ports = tuple(each.port for each in opened)
    nets = tuple(
        NetDevice(each.port.interface, each.port.mac, tuple(each.tap_fds), tuple(fds))
        for each, fds in zip(opened, vhost, strict=True)
    )
    interfaces = Interfaces(ports, nets)
    if DRIVERS[kind].looks_up_tap:
        try:
            await loop.in_worker(place_stand_ins, nets, launcher)
        except BaseException:
            for fd in interfaces.fds():
                os.close(fd)
            raise
    return interfaces


def open_vhost(opened: OpenPort, node: Path = VHOST_NET) -> Sequence[int]:
    """Blocks. One descriptor for each queue; none where the kernel has no vhost-net."""
    fds: list[int] = []
    try:
        for _ in opened.tap_fds:
            fds.append(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        for fd in fds:
            os.close(fd)
        if fds:
            raise StartFailed(f"cannot open {node}: {error.strerror}") from error
        # Not there, or its module is not: the VMM carries the packets itself.
        return ()
    return fds
