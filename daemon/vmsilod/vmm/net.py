"""Network interfaces as arguments of each VMM.

Called by the drivers' plan_launch. Pure. Every interface is made of open descriptors: no VMM opens
/dev/net/tun, names a TAP or has a right to change one, and each sees an empty network namespace.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from vmsilod.vmm.errors import BadOptionValue, LaunchRefused

if TYPE_CHECKING:
    from vmsilod.vmm.launch import Leases, NetDevice, PassedFds

SPARE_PORTS = 4
"""Interfaces that a running q35 machine can be given beside those that it starts with."""
PORT_ID = "netport"
FIRST_CHASSIS = 100
# What every VMM takes unquoted in the name of a device; a part of what Linux allows in an interface's name.
_INTERFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")
_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")


def plan_crosvm(leases: Leases, fds: PassedFds) -> list[str]:
    argv = []
    for net in leases.nets:
        check_device(net)
        if len(net.tap_fds) != 1 or net.vhost_fds:
            # With vq-pairs it would open /dev/net/tun for the others, and it opens /dev/vhost-net itself.
            raise LaunchRefused(f"{leases.name}: crosvm takes one queue of {net.name} and no vhost-net")
        argv += ["--net", f"tap-fd={fds.number(net.tap_fds[0])},mac={net.mac}"]
    return argv


def plan_cloud_hypervisor(leases: Leases, fds: PassedFds) -> list[str]:
    argv = []
    for net in leases.nets:
        check_device(net)
        if net.vhost_fds:
            raise LaunchRefused(f"{leases.name}: cloud-hypervisor has no vhost-net")
        numbers = ",".join(str(fds.number(fd)) for fd in net.tap_fds)
        # No mtu: it would set the TAP's, which it may not.
        argv += ["--net", f"id={net.id},mac={net.mac},fd=[{numbers}],num_queues={2 * len(net.tap_fds)}"]
    return argv


def plan_qemu(leases: Leases, fds: PassedFds, machine: str) -> list[str]:
    argv = _plan_ports(leases) if machine == "q35" else []
    for index, net in enumerate(leases.nets):
        check_device(net)
        netdev = f"tap,id={net.id},fds={_join(fds, net.tap_fds)}"
        if net.vhost_fds:
            netdev += f",vhost=on,vhostfds={_join(fds, net.vhost_fds)}"
        argv += ["-netdev", netdev]
        if machine == "q35":
            words = describe_qemu_device(net, f"{PORT_ID}{index}")
        else:
            words = {"driver": "virtio-net-device", "netdev": net.id, "id": net.id, "mac": net.mac}
            words |= {"mq": True} if len(net.tap_fds) > 1 else {}
        driver = words.pop("driver")
        argv += ["-device", ",".join([driver, *(f"{key}={_word(value)}" for key, value in words.items())])]
    return argv


def describe_qemu_device(net: NetDevice, port: str) -> dict[str, Any]:
    """The arguments of -device and of QMP's device_add for an interface of a q35 machine."""
    pairs = len(net.tap_fds)
    # romfile: no boot firmware from the network, whose file need not be installed either.
    words: dict[str, Any] = {"driver": "virtio-net-pci", "netdev": net.id, "id": net.id, "mac": net.mac}
    words |= {"bus": port, "romfile": ""}
    # An interrupt for each queue, one for the control queue and one for changes of the configuration.
    return words | ({"mq": True, "vectors": 2 * pairs + 2} if pairs > 1 else {})


def _plan_ports(leases: Leases) -> list[str]:
    """A PCIe port for each interface and some to spare: nothing can be plugged into q35's root bus."""
    if not leases.nets:
        return []
    argv = []
    for number in range(len(leases.nets) + SPARE_PORTS):
        # A chassis each, so that the slots need no numbers; out of the way of ports in extra_args.
        argv += ["-device", f"pcie-root-port,id={PORT_ID}{number},chassis={FIRST_CHASSIS + number}"]
    return argv


def check_device(net: NetDevice) -> None:
    """BadOptionValue for what could end the value that it stands in."""
    if not _INTERFACE.fullmatch(net.name):
        raise BadOptionValue(f"{net.name!r} cannot be the name of a network interface of a VM")
    if not _MAC.fullmatch(net.mac):
        raise BadOptionValue(f"{net.mac!r} is not the address of one network interface")
    if not net.tap_fds or len(net.vhost_fds) not in (0, len(net.tap_fds)):
        raise LaunchRefused(f"the queues of {net.name} are not whole")


def _join(fds: PassedFds, those: tuple[int, ...]) -> str:
    return ":".join(str(fds.number(fd)) for fd in those)


def _word(value: str | int) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
