"""The TAPs of all VMs: made when the configuration is read, opened when a VM starts, gone with its
configuration; and the rules around them, which nobody can take away for long.

Built by main. Called by the publication (apply), by runs (open, close, repair) and by the lifecycle for the
bus; the watch tells it of changes that others make. It runs on the GLib loop, one thing at a time; the work is
the batch's, in the worker. What it has is also in the kernel and in the VMs' records: it may be killed at any
moment. A VM whose TAPs or rules are not in place does not start.
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
from vmsilod.network.links import open_links
from vmsilod.network.plan import NetworkPlan
from vmsilod.network.sight import host_ports, judge, look
from vmsilod.network.taps import open_queues
from vmsilod.waiting import Lock

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    """`held` has the ports of the VMs that run, as they were started."""

    def __init__(self) -> None:
        self._configured = NetworkPlan()
        self._held: dict[str, tuple[Port, ...]] = {}
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
            return opened

    async def close(self, vm: str) -> None:
        """The VM has ended. Never fails. What its VMM may have changed of a TAP ends with that TAP."""
        if vm not in self._held:
            return
        async with self._lock:
            ports = self._held.pop(vm, ())
            if merge(self._configured, self._held) != self._now or await loop.in_worker(
                _find_changed, ports
            ):
                await self._settle()

    async def repair(self, running: NetworkPlan) -> None:
        """At start: the ports of VMs that run, made of what they were started with."""
        async with self._lock:
            self._held = {port.vm: running.ports_of(port.vm) for port in running.ports}

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
            ports = host_ports(self._now.plan)
            if not ports or not await loop.in_worker(installed.find_fault, self._now.plan):
                return
            log.error("somebody removed or changed vmsilo's network rules; installing them again")
            await loop.in_worker(batch.stop_forwarding, self._now.plan)
            await self._settle()

    async def _guard_links(self) -> None:
        async with self._lock:
            assert self._settled is not None
            found = await loop.in_worker(_find_faults, host_ports(self._now.plan))
            if found != dict(self._settled.faults):
                await self._settle()

    async def _find_fault(self, vm: str) -> str:
        if vm in self._now.refused:
            return self._now.refused[vm]
        if self._settled is None:
            return "it has not been set up yet"
        ports = self.ports_of(vm)
        faults = await loop.in_worker(_find_faults, ports)
        return next(iter(faults.values()), "") or await loop.in_worker(installed.find_fault, self._now.plan)

    async def _settle(self) -> None:
        self._now = merge(self._configured, self._held)
        for vm, fact in self._now.refused.items():
            log.warning("VM %s: its network waits: %s", vm, fact)
        before = self._settled or Settled()
        settled = await loop.in_worker(batch.settle, self._now.plan, frozenset(self._held))
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
            if link is None:
                raise StartFailed(f"the TAP '{port.tap}' is gone")
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
