"""Decides what may be done with PCI functions, and plans it as a list of small operations.

Pure: topology, usage and what vmsilo knows go in, operations (see `binding`) come out, or a Refusal that
states the fact, names the devices and says what to do. A refusal means that nothing was changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmsilod.errors import Busy, StartFailed
from vmsilod.pci.topology import VFIO_DRIVER, Function

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vmsilod.pci.topology import Topology
    from vmsilod.pci.usage import Usage

NO_IOMMU_HINT = (
    "switch on VT-d or AMD-Vi in the firmware, boot with intel_iommu=on (Intel) or without amd_iommu=off"
    " (AMD), and look at /sys/kernel/iommu_groups"
)


FORGED_INTERRUPTS_HINT = (
    "switch on interrupt remapping in the firmware, and boot without intremap=off; or accept that the guest"
    " may disturb this host: options vfio_iommu_type1 allow_unsafe_interrupts=1 in /etc/modprobe.d"
)


class Refused(StartFailed):
    """A device cannot be given away."""


class DeviceBusy(Busy):
    """A device is in use by a VM, so it cannot be taken or given back now."""


@dataclass(frozen=True)
class Override:
    """Which driver alone may bind; "" for any. `before` is what undoing it writes."""

    address: str
    driver: str
    before: str = ""


@dataclass(frozen=True)
class Unbind:
    address: str
    driver: str


@dataclass(frozen=True)
class Probe:
    """Let the kernel look for a driver; `expected` must have it after that ("": any or none)."""

    address: str
    expected: str = ""


@dataclass(frozen=True)
class Announce:
    """Tell udev of the device again, so that it loads the module of its driver."""

    address: str


@dataclass(frozen=True)
class AwaitGroup:
    """Wait until udev has made the node of a VFIO group."""

    group: int


@dataclass(frozen=True)
class GiveGroup:
    """The group's node belongs to `uid`."""

    group: int
    uid: int


Operation = Override | Unbind | Probe | Announce | AwaitGroup | GiveGroup


@dataclass(frozen=True)
class Known:
    """What vmsilo knows beside sysfs: address -> VM that has it, address -> (VM that had it, why)."""

    held: Mapping[str, str] = field(default_factory=dict)
    tainted: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """A VM's start: the functions, and the uid that its VMM runs as."""

    vm: str
    uid: int
    addresses: tuple[str, ...]


def plan_start(topology: Topology, usage: Usage, known: Known, wanted: Wanted) -> list[Operation]:
    """Everything between "configured" and "the VMM can open it". Refused says what speaks against it."""
    functions = [find_function(topology, address) for address in wanted.addresses]
    for function in functions:
        _check_device(topology, function)
        _check_known(function, known, wanted.vm)
    if topology.forged_interrupts and functions:
        raise Refused(
            f"this host's IOMMU does not remap interrupts, so {functions[0].shown} could forge any",
            FORGED_INTERRUPTS_HINT,
        )
    for function in functions:
        _check_group(topology, function, known, wanted)
        _check_usage(function, usage)
        _check_reset(topology, function, wanted.addresses)
    operations: list[Operation] = []
    for function in functions:
        operations += _plan_binding(function)
    for group in dict.fromkeys(function.group for function in functions):
        assert group is not None
        operations += [AwaitGroup(group), GiveGroup(group, wanted.uid)]
    return operations


def plan_claim(topology: Topology, usage: Usage, known: Known, address: str) -> list[Operation]:
    """From the host to vfio-pci, for no VM yet: also for none that has another device of its group."""
    function = find_function(topology, address)
    _check_device(topology, function)
    _check_usage(function, usage)
    operations = _plan_binding(function)
    if operations:
        _check_group_unheld(topology, function, known)
    assert function.group is not None
    return [*operations, AwaitGroup(function.group)] if operations else []


def plan_give_back(topology: Topology, known: Known, address: str) -> list[Operation]:
    """From vfio-pci to whatever driver of the host wants it."""
    function = find_function(topology, address)
    if holder := known.held.get(address):
        raise DeviceBusy(f"{function.shown} is used by VM '{holder}'", f"vm-stop {holder}")
    if taint := known.tainted.get(address):
        raise DeviceBusy(
            f"{function.shown} is tainted: VM '{taint[0]}' had it, and {taint[1]}",
            "it goes back to the host at the next boot",
        )
    _check_group_unheld(topology, function, known)
    operations: list[Operation] = []
    if function.driver == VFIO_DRIVER:
        operations.append(Unbind(address, VFIO_DRIVER))
    if function.override:
        operations.append(Override(address, "", function.override))
    if operations:
        operations += [Probe(address), Announce(address)]
    return operations


def plan_undo(function: Function, driver: str, override: str) -> list[Operation]:
    """Back to how it was before a claim that was broken off; no guest has seen the device since."""
    operations: list[Operation] = []
    if function.driver == VFIO_DRIVER != driver:
        operations.append(Unbind(function.address, VFIO_DRIVER))
    if function.override != override:
        operations.append(Override(function.address, override, function.override))
    if driver and function.driver != driver:
        operations.append(Probe(function.address))
    return operations


def plan_isolation(topology: Topology, usage: Usage, address: str) -> list[Operation]:
    """At boot. A device without a driver is kept from the host's even where vfio-pci cannot take it."""
    function = find_function(topology, address)
    if function.with_host or function.is_bridge:
        return plan_claim(topology, usage, Known(), address)
    operations: list[Operation] = []
    if function.override != VFIO_DRIVER:
        operations.append(Override(address, VFIO_DRIVER, function.override))
    if function.driver != VFIO_DRIVER:
        operations.append(Probe(address))
    return operations


def find_function(topology: Topology, address: str) -> Function:
    function = topology.functions.get(address)
    if function is None:
        raise Refused(f"there is no PCI device {address}", "vmsilo pci list")
    return function


def resets_with_bus(topology: Topology, function: Function, addresses: Iterable[str]) -> bool:
    """VFIO resets what cannot be reset alone together with its bus, if one VM has all of that bus."""
    if function.resets or not function.parent:
        return False
    return {other.address for other in topology.find_bus(function)} <= set(addresses)


def _check_device(topology: Topology, function: Function) -> None:
    if function.is_bridge:
        raise Refused(
            f"{function.shown} is a bridge, which cannot be given to a VM", "name the device behind it"
        )
    if not topology.has_iommu:
        raise Refused(
            f"this host has no working IOMMU, so {function.shown} could reach all of its memory",
            NO_IOMMU_HINT,
        )
    if function.group is None:
        raise Refused(
            f"{function.shown} is in no IOMMU group: the IOMMU of this host does not cover it",
            "choose another device",
        )


def _check_group_unheld(topology: Topology, function: Function, known: Known) -> None:
    for other in topology.find_group(function.group):
        if holder := known.held.get(other.address):
            raise DeviceBusy(
                f"{function.shown} shares IOMMU group {function.group} with {other.shown},"
                f" which is used by VM '{holder}'",
                f"vm-stop {holder}",
            )


def _check_known(function: Function, known: Known, vm: str) -> None:
    holder = known.held.get(function.address)
    if holder is not None and holder != vm:
        raise Refused(f"{function.shown} is used by VM '{holder}'", f"vm-stop {holder}")
    taint = known.tainted.get(function.address)
    if taint is not None and taint[0] != vm:
        raise Refused(
            f"{function.shown} is tainted: VM '{taint[0]}' had it, and {taint[1]}",
            f"until the next boot only VM '{taint[0]}' can have it",
        )


def _check_group(topology: Topology, function: Function, known: Known, wanted: Wanted) -> None:
    """A device can reach the memory that any device of its IOMMU group can."""
    others = [
        other
        for other in topology.find_group(function.group)
        if other.address not in wanted.addresses and not other.is_bridge
    ]
    with_host = [other for other in others if other.with_host]
    if with_host:
        raise Refused(
            f"{function.shown} shares IOMMU group {function.group} with devices of the host: "
            + ", ".join(other.shown for other in with_host),
            "give the whole group to one VM, or move the device to another slot",
        )
    for other in others:
        holder = known.held.get(other.address)
        if holder is not None and holder != wanted.vm:
            raise Refused(
                f"{function.shown} shares IOMMU group {function.group} with {other.shown},"
                f" which is used by VM '{holder}'",
                "give the whole group to one VM",
            )
    for other in others:
        # Whoever may open the group's node can open each device of it that vfio-pci has.
        if other.driver == VFIO_DRIVER:
            raise Refused(
                f"{function.shown} shares IOMMU group {function.group} with {other.shown},"
                f" which VM '{wanted.vm}' could open too",
                f"list it in pci_devices too, or release it: vmsilo pci release {other.address}",
            )


def _check_usage(function: Function, usage: Usage) -> None:
    if not function.with_host:
        return
    if reasons := usage.reasons.get(function.address):
        raise Refused(
            f"{function.shown} is in use by this host: {'; '.join(reasons)}",
            "free it first"
            if function.address in usage.needed
            else "free it first, or name it in isolated_pci_devices and boot anew",
        )


def _check_reset(topology: Topology, function: Function, addresses: tuple[str, ...]) -> None:
    if function.resets or resets_with_bus(topology, function, addresses):
        return
    others = [other for other in topology.find_bus(function) if other.address not in addresses]
    together = f"{', '.join(other.shown for other in others)}" if function.parent and others else ""
    raise Refused(
        f"{function.shown} cannot be reset, so what one guest leaves in it would reach the next"
        + (f"; it could be reset only together with {together}" if together else ""),
        "give all of them to this VM" if together else "choose another device",
    )


def _plan_binding(function: Function) -> list[Operation]:
    """Unbind before the override: undone in reverse, the old driver is called when it may bind again."""
    operations: list[Operation] = []
    if function.driver not in ("", VFIO_DRIVER):
        operations.append(Unbind(function.address, function.driver))
    if function.override != VFIO_DRIVER:
        operations.append(Override(function.address, VFIO_DRIVER, function.override))
    if function.driver != VFIO_DRIVER:
        operations.append(Probe(function.address, VFIO_DRIVER))
    return operations
