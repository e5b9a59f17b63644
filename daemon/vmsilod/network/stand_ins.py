"""Stand-ins for TAPs in the network namespace of a VMM that looks for them there.

crosvm asks for the MTU of each TAP by its name, over a socket of its own network namespace, and does not
start without an answer (mtu() in its net_util/src/sys/linux/tap.rs). The TAP is not there, nor must it be.
Called by the runs, in the worker, before a launcher becomes a crosvm. A stand-in is down, leads nowhere, and
ends with the namespace: nobody has to take it away.
"""

from __future__ import annotations

import fcntl
import struct
from typing import TYPE_CHECKING

from vmsilod.errors import StartFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsilod.vmm.launch import NetDevice

TUNGETIFF = 0x800454D2  # linux/if_tun.h
_REQUEST = struct.Struct("16sH22x")  # ifreq: name, flags
_EXISTS = 17
FIRST_INDEX = 0x7600_0000
"""Of the stand-ins in that namespace, and of nothing in this one: before Linux 6.15 it is *this* namespace
in which the kernel looks whether a new device is there already, by its number where it is given one, else by
its name, which a TAP of the host's own network has.
"""


def place_stand_ins(devices: Sequence[NetDevice], pid: int) -> None:
    """Network devices of the TAPs' names in the network namespace of process `pid`.

    It is found by the number of the process: to open /proc/PID/ns/net would need CAP_SYS_PTRACE. Any kind of
    device would do; every distribution's kernel has bridges.
    """
    if not devices:
        return
    # Late: 130 ms, and only crosvm needs it.
    from pyroute2 import IPRoute, NetlinkError

    names = [read_name(device.tap_fds[0]) for device in devices]
    with IPRoute() as netlink:
        for index, name in enumerate(names, FIRST_INDEX):
            try:
                netlink.link("add", index=index, ifname=name, kind="bridge", net_ns_pid=pid)
            except NetlinkError as error:
                # A launcher whose vmsilod died has asked before.
                if error.code != _EXISTS:
                    raise StartFailed(f"cannot put a stand-in for '{name}' beside crosvm") from error


def read_name(tap_fd: int) -> str:
    """As the kernel tells whoever has the descriptor of a TAP or macvtap."""
    answer = bytearray(_REQUEST.size)
    try:
        fcntl.ioctl(tap_fd, TUNGETIFF, answer)
    except OSError as error:
        raise StartFailed(f"a descriptor for a VM is not that of a TAP: {error.strerror}") from error
    name: bytes = _REQUEST.unpack(answer)[0]
    return name.partition(b"\0")[0].decode()
