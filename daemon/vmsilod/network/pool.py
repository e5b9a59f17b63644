"""The TAPs of all VMs: made when the configuration is read, opened when a VM starts, gone with its
configuration; and the rules around them, which nobody can take away for long.

Built by main. Called by the publication (apply), by runs (open, close, repair) and by the lifecycle for the
bus; the watch tells it of changes that others make. It runs on the GLib loop, one thing at a time; the work
is the batch's, in the worker. What it has is also in the kernel and in the VMs' records: it may be killed at
any moment. A VM whose TAPs or rules are not in place does not start.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmsilod import loop
from vmsilod.errors import StartFailed, VmsiloError
from vmsilod.network import batch, installed, traffic
from vmsilod.network.batch import Settled
from vmsilod.network.effective import Effective, merge
from vmsilod.network.forwarding import LENT_FILE
from vmsilod.network.links import open_links
from vmsilod.network.plan import NetworkPlan
from vmsilod.network.sight import host_ports, judge, look
from vmsilod.network.taps import open_queues
from vmsilod.waiting import Lock

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from vmsilod.network.plan import Port
    from vmsilod.network.traffic import PortView

log = logging.getLogger(__name__)

RULES_HINT = "journalctl -u vmsilod; a VM with a network does not start without its rules"


@dataclass(frozen=True)
class OpenPort:
    """A port with its TAP open: a descriptor per queue, which belong to whoever holds this."""

    port: Port
    tap_fds: list[int] = field(default_factory=list)


class NetworkPool:
    """`_held` has the ports of the VMs that run, as they were started; `_running` also names those of which
    that cannot be told.
    """

    def __init__(self, lent_file: Path = LENT_FILE) -> None:
        self._lent_file = lent_file
        self._configured = NetworkPlan()
        self._held: dict[str, tuple[Port, ...]] = {}
        self._running: set[str] = set()
        self._now = Effective()
        self._settled: Settled | None = None  # before the first apply
        self._lock = Lock()
        self._checking = False

    async def apply(self, plan: NetworkPlan) -> None:
        """Take over the configuration's plan. Never fails: what is wrong is told, and to whoever starts."""
        async with self._lock:
            self._configured = plan
            await self._settle()

    async def open(self, vm: str) -> list[OpenPort]:
        """In the order of the VM's configuration; [] for an offline VM. Raises StartFailed."""
        async with self._lock:
            ports = self.ports_of(vm)
            if not ports and vm not in self._now.refused:
                return []
            if fault := await self._find_fault(vm):
                # Once more, from the ground: what was in the way may be gone.
                await self._settle()
                fault = await self._find_fault(vm)
            if fault:
                raise StartFailed(f"the network of VM '{vm}' is not in place: {fault}", RULES_HINT)
            opened = await loop.in_worker(_open_all, self.ports_of(vm))
            self._held[vm] = self.ports_of(vm)
            self._running.add(vm)
            return opened

    async def close(self, vm: str) -> None:
        """The VM has ended. Never fails. What its VMM may have changed of a TAP ends with that TAP."""
        if vm not in self._running:
            return
        async with self._lock:
            ports = self._held.pop(vm, ())
            self._running.discard(vm)
            if not ports or merge(self._configured, self._held) != self._now or await loop.in_worker(
                _find_changed, ports
            ):
                await self._settle()

    async def repair(self, running: Iterable[str], plan: NetworkPlan) -> None:
        """At start: the VMs that run, and the plan of what they were started with, as far as it is known."""
        async with self._lock:
            self._held = {port.vm: plan.ports_of(port.vm) for port in plan.ports}
            self._running = {*running, *self._held}

    def ports_of(self, vm: str) -> tuple[Port, ...]:
        """Those in the host's own network that a start would get now, or that the running VM has."""
        return tuple(port for port in host_ports(self._now.plan) if port.vm == vm)

    async def find_views(self, vm: str) -> list[PortView]:
        """Raises Failed."""
        ports = self.ports_of(vm)
        faults = self._settled.faults if self._settled is not None else {}
        return await loop.in_worker(traffic.find_views, ports, faults) if ports else []

    def rules_touched(self) -> None:
        """Somebody changed our tables, or we did."""
        if self._settled is not None and not self._checking:
            self._checking = True
            loop.spawn(self._guard_rules())

    def links_touched(self) -> None:
        """A network device came, went or changed."""
        if self._settled is not None:
            loop.spawn(self._guard_links())

    async def _guard_rules(self) -> None:
        async with self._lock:
            self._checking = False
            assert self._settled is not None
            ruled = self._settled.ruled
            if not ruled.ports or not await loop.in_worker(installed.find_fault, ruled):
                return
            log.error("somebody removed or changed vmsilo's network rules; installing them again")
            await loop.in_worker(batch.stop_forwarding, self._now.plan)
            await self._settle()

    async def _guard_links(self) -> None:
        async with self._lock:
            assert self._settled is not None
            found = await loop.in_worker(_find_faults, host_ports(self._now.plan))
            if found != dict(self._settled.judged) or not await loop.in_worker(batch.lends, self._now.plan):
                await self._settle()

    async def _find_fault(self, vm: str) -> str:
        if vm in self._now.refused:
            return self._now.refused[vm]
        if self._settled is None:
            return "it has not been set up yet"
        if self._settled.rules_fault:
            return f"its rules cannot be installed: {self._settled.rules_fault}"
        ports = self.ports_of(vm)
        known = [self._settled.faults[port.tap] for port in ports if port.tap in self._settled.faults]
        found = [*known, *(await loop.in_worker(_find_faults, ports)).values()]
        return found[0] if found else await loop.in_worker(installed.find_fault, self._settled.ruled)

    async def _settle(self) -> None:
        self._now = merge(self._configured, self._held)
        for vm, fact in self._now.refused.items():
            log.warning("VM %s: its network waits: %s", vm, fact)
        before = self._settled or Settled()
        settled = await loop.in_worker(
            batch.settle, self._now.plan, frozenset(self._running), self._lent_file
        )
        for tap, fault in settled.faults.items():
            if before.faults.get(tap) != fault:
                log.error("%s", fault)
        if settled.rules_fault and settled.rules_fault != before.rules_fault:
            log.error("the network rules cannot be installed: %s", settled.rules_fault)
        self._settled = settled


def _open_all(ports: Sequence[Port]) -> list[OpenPort]:
    """Blocks."""
    opened: list[OpenPort] = []
    try:
        with open_links() as links:
            seen = links.find_all()
        for port in ports:
            link = seen.get(port.tap)
            if link is None or link.tap is None or link.tap.queues:
                # Of one with a single queue the kernel says so itself.
                raise StartFailed(f"cannot open the TAP '{port.tap}': another process has it open")
            opened.append(OpenPort(port, open_queues(port.tap, link.index, port.queues)))
    except VmsiloError:
        for fd in (fd for each in opened for fd in each.tap_fds):
            os.close(fd)
        raise
    return opened


def _find_faults(ports: Sequence[Port]) -> dict[str, str]:
    """Blocks."""
    if not ports:
        return {}
    with open_links() as links:
        sight = look(links)
    return {port.tap: fault for port in ports if (fault := judge(sight, port))}


def _find_changed(ports: Sequence[Port]) -> bool:
    """Blocks."""
    try:
        return bool(_find_faults(ports))
    except VmsiloError:
        return True
