"""The open TAPs of a starting VM as what its VMM is given: with vhost-net where both have it.

Called by the runs, in the worker. It opens /dev/vhost-net, which a VMM's own uid may not, and puts a
stand-in where crosvm looks for a TAP. What it returns belongs to the caller.
"""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from vmsilod.errors import StartFailed
from vmsilod.host import VHOST_NET
from vmsilod.vmm.launch import NetDevice

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmsilod.host import Host
    from vmsilod.network.plan import Port
    from vmsilod.vmm.drivers import Driver

TUNGETIFF = 0x800454D2  # linux/if_tun.h
_REQUEST = struct.Struct("16sH22x")  # ifreq: name, flags
_EXISTS = 17


class OpenPort(Protocol):
    @property
    def port(self) -> Port: ...

    @property
    def tap_fds(self) -> Sequence[int]: ...


def open_devices(ports: Sequence[OpenPort], driver: Driver, host: Host) -> tuple[NetDevice, ...]:
    """The TAPs' descriptors go over into the devices; where this fails they stay the caller's."""
    with ExitStack() as stack:
        devices = []
        for each in ports:
            taps = tuple(each.tap_fds)
            vhosts = []
            for _ in taps if driver.vhost_net and host.vhost_net else ():
                vhosts.append(fd := _open_vhost_net())
                stack.callback(os.close, fd)
            devices.append(NetDevice(each.port.interface, each.port.mac, taps, tuple(vhosts)))
        stack.pop_all()
        return tuple(devices)


def _open_vhost_net() -> int:
    try:
        return os.open(VHOST_NET, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise StartFailed(f"cannot open {VHOST_NET}: {error.strerror}") from error


def place_stand_ins(devices: Sequence[NetDevice], pid: int) -> None:
    """Devices of the TAPs' names in the network namespace of process `pid`, which is to become a crosvm.

    crosvm asks for the MTU of each TAP by its name, in its own network namespace, and does not start without
    an answer (mtu() in net_util/src/sys/linux/tap.rs). The TAP is not there, nor must it be. A stand-in is
    down, leads nowhere, and ends with the namespace. That is found by the number of the process: to open
    /proc/PID/ns/net would need CAP_SYS_PTRACE. Any kind of device does; bridges are in every kernel.
    """
    if not devices:
        return
    names = [read_name(device.tap_fds[0]) for device in devices]
    with _open_netlink() as (netlink, refused):
        for name in names:
            try:
                netlink.link("add", ifname=name, kind="bridge", net_ns_pid=pid)
            except refused as error:
                # A launcher whose vmsilod died has asked before.
                if error.code != _EXISTS:
                    raise StartFailed(f"cannot put a stand-in for '{name}' beside crosvm") from error


def read_name(tap_fd: int) -> str:
    answer = bytearray(_REQUEST.size)
    try:
        fcntl.ioctl(tap_fd, TUNGETIFF, answer)
    except OSError as error:
        raise StartFailed(f"a descriptor for a VM is not that of a TAP: {error.strerror}") from error
    name: bytes = _REQUEST.unpack(answer)[0]
    return name.partition(b"\0")[0].decode()


@contextmanager
def _open_netlink() -> Iterator[tuple[Any, type[Any]]]:
    # Late: 130 ms, and only crosvm needs it.
    from pyroute2 import IPRoute, NetlinkError

    with IPRoute() as netlink:
        yield netlink, NetlinkError
