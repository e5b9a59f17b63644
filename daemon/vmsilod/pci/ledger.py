"""Takes PCI devices from the host, gives them to VMs and takes them back, keeping the books all the while.

Every method blocks, and runs in a worker with the claims' lock held. The state is saved before a change of
the kernel's own: `repair` after a kill -9 finds what was under way. A device that a VM had is reset before
another may have it, and never goes back to a driver of the host by itself.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsilod.errors import VmsiloError
from vmsilod.pci import binding, plan
from vmsilod.pci.state import STATE_FILE, load_state, save_state
from vmsilod.pci.topology import VFIO_DRIVER, read_topology
from vmsilod.pci.usage import find_usage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from vmsilod.pci.plan import Operation
    from vmsilod.pci.roots import Roots
    from vmsilod.pci.topology import Function, Topology
    from vmsilod.pci.usage import Usage

log = logging.getLogger(__name__)

VANISHED = "it vanished, so it could not be reset"


@dataclass(frozen=True)
class PciView:
    """One function as `vmsilo pci list` shows it. state: host (a driver of the host has it), free (nobody),
    claimed (vfio-pci, no VM), used (by `vm`), tainted (was `vm`'s, and not reset since).
    """

    address: str
    class_code: str
    name: str
    driver: str
    group: int
    state: str
    vm: str
    isolated: bool
    resets: tuple[str, ...]
    note: str


class Ledger:
    """Lives as long as vmsilod; what it knows survives in its file."""

    def __init__(self, roots: Roots, file: Path = STATE_FILE) -> None:
        self._roots = roots
        self._file = file
        self._state = load_state(file, roots.proc / "sys/kernel/random/boot_id")

    def check_start(self, wanted: plan.Wanted) -> None:
        """Refused if `start` would be."""
        topology = read_topology(self._roots)
        plan.plan_start(topology, find_usage(self._roots, topology), self._known(), wanted)

    def check_claim(self, address: str) -> None:
        topology = read_topology(self._roots)
        plan.plan_claim(topology, find_usage(self._roots, topology), self._known(), address)

    def start(self, wanted: plan.Wanted) -> None:
        """For a VM that starts. After a VmsiloError everything is as it was."""
        topology = read_topology(self._roots)
        usage = find_usage(self._roots, topology)
        operations = plan.plan_start(topology, usage, self._known(), wanted)
        functions = [topology.functions[address] for address in wanted.addresses]
        for function in functions:
            self._state.held[function.address] = wanted.vm
        try:
            self._execute(operations, functions, usage)
        except BaseException:
            for function in functions:
                self._state.held.pop(function.address, None)
            self._save()
            raise

    def end(self, vm: str) -> None:
        """The VM's run is over: no uid may open its groups, and each device is reset or tainted. What was
        broken off is undone first, since no guest has had that.
        """
        self._undo_pending()
        held = [address for address, holder in self._state.held.items() if holder == vm]
        if not held:
            return
        topology = read_topology(self._roots)
        functions = [topology.functions[address] for address in held if address in topology.functions]
        for group in {function.group for function in functions if function.group is not None}:
            binding.take_group_back(group, self._roots)
        for function in functions:
            reason = binding.reset(function, self._roots)
            if reason:
                log.warning("%s is tainted: VM %s had it, and %s", function.shown, vm, reason)
                self._state.tainted[function.address] = (vm, reason)
            else:
                self._state.tainted.pop(function.address, None)
        for address in held:
            if address not in topology.functions:
                log.warning("%s is tainted: VM %s had it, and %s", address, vm, VANISHED)
                self._state.tainted[address] = (vm, VANISHED)
            del self._state.held[address]
        self._save()

    def claim(self, address: str) -> None:
        topology = read_topology(self._roots)
        usage = find_usage(self._roots, topology)
        operations = plan.plan_claim(topology, usage, self._known(), address)
        if address in self._state.released:
            self._state.released.remove(address)
        self._execute(operations, [topology.functions[address]], usage)

    def give_back(self, address: str, *, isolated: bool) -> str:
        """The driver of the host that has it now, "" if there is none. An isolated device stays with it."""
        operations = plan.plan_give_back(read_topology(self._roots), self._known(), address)
        binding.execute(operations, self._roots)
        if isolated and address not in self._state.released:
            self._state.released.append(address)
        self._state.origin.pop(address, None)
        self._save()
        return plan.find_function(read_topology(self._roots), address).driver

    def isolate(self, addresses: Iterable[str]) -> None:
        """Claim what the configuration wants kept from the host; what cannot be is told, and stays."""
        for address in addresses:
            if address in self._state.released or address in self._state.held:
                continue
            try:
                self.claim(address)
            except VmsiloError as error:
                log.warning("the isolated device %s is not claimed: %s", address, error)

    def repair(self, running: Iterable[str]) -> None:
        """At vmsilod's start: undo claims that were broken off, take back what ended runs had. What cannot
        be taken back counts as held, and the others are not held up by it.
        """
        self._undo_pending()
        for vm in sorted(set(self._state.held.values()) - set(running)):
            try:
                self.end(vm)
            except VmsiloError as error:
                log.error("VM %s: its PCI devices are not all taken back: %s", vm, error)

    def holds(self, vm: str) -> bool:
        """Does not block."""
        return vm in tuple(self._state.held.values())

    def find_views(self, isolated: Sequence[str]) -> list[PciView]:
        topology = read_topology(self._roots)
        usage = find_usage(self._roots, topology)
        return [self._view(topology, usage, function, isolated) for function in topology.functions.values()]

    def _known(self) -> plan.Known:
        return plan.Known(dict(self._state.held), dict(self._state.tainted))

    def _execute(self, operations: Sequence[Operation], functions: Sequence[Function], usage: Usage) -> None:
        changed = [function for function in functions if _changes_driver(operations, function)]
        for function in changed:
            self._state.pending[function.address] = (function.driver, function.override)
        self._save()
        try:
            binding.execute(operations, self._roots)
        finally:
            for function in changed:
                del self._state.pending[function.address]
        for function in changed:
            if function.with_host:
                self._state.origin[function.address] = function.driver
            for warning in usage.warnings.get(function.address, ()):
                log.warning("%s is with vfio-pci now, and %s", function.shown, warning)
        self._save()

    def _undo_pending(self) -> None:
        if not self._state.pending:
            return
        topology = read_topology(self._roots)
        for address, (driver, override) in list(self._state.pending.items()):
            self._state.held.pop(address, None)
            function = topology.functions.get(address)
            if function is not None:
                log.info("%s: undoing a claim that was broken off", function.shown)
                self._undo(function, driver, override)
            del self._state.pending[address]
        self._save()

    def _undo(self, function: Function, driver: str, override: str) -> None:
        try:
            if function.group is not None:
                binding.take_group_back(function.group, self._roots)
            binding.execute(plan.plan_undo(function, driver, override), self._roots)
        except VmsiloError as error:
            log.error("%s: %s", function.shown, error)

    def _view(
        self, topology: Topology, usage: Usage, function: Function, isolated: Sequence[str]
    ) -> PciView:
        address = function.address
        holder = self._state.held.get(address, "")
        tainted = self._state.tainted.get(address)
        notes = [*usage.reasons.get(address, ()), *usage.warnings.get(address, ())]
        if function.group is None and topology.has_iommu:
            notes.append("in no IOMMU group")
        if tainted:
            notes.append(tainted[1])
        if address in self._state.released and address in isolated:
            notes.append("released until the next boot")
        if address in self._state.origin:
            notes.append(f"was with {self._state.origin[address]}")
        state = "used" if holder else "tainted" if tainted else "host" if function.with_host else "free"
        return PciView(
            address=address,
            class_code=f"{function.class_code:04x}",
            name=function.name,
            driver=function.driver,
            group=-1 if function.group is None else function.group,
            state="claimed" if state == "free" and function.driver == VFIO_DRIVER else state,
            vm=holder or (tainted[0] if tainted else ""),
            isolated=address in isolated,
            resets=function.resets,
            note="; ".join(notes),
        )

    def _save(self) -> None:
        save_state(self._state, self._file)


def _changes_driver(operations: Sequence[Operation], function: Function) -> bool:
    kinds = (plan.Override, plan.Unbind, plan.Probe)
    return any(isinstance(op, kinds) and op.address == function.address for op in operations)
