"""The TAPs of all VMs: made when the configuration is read, opened when a VM starts, gone with its
configuration; and the rules around them, which nobody can take away for long.

Built by main. Called by the publication (apply), by runs (open, close, repair), by hotplug (attach, detach)
and by the lifecycle for the bus; the watch tells it of changes that others make. It runs on the GLib loop,
one thing at a time; the work is the batch's, in the worker. What it has is also in the kernel and in the
VMs' records: it may be killed at any moment. A VM whose TAPs or rules are not in place does not start.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from vmsilod import loop
from vmsilod.errors import Busy, Failed, StartFailed, VmsiloError
from vmsilod.network import batch, installed, macvtap, nft, traffic
from vmsilod.network.batch import Settled
from vmsilod.network.forwarding import LENT_FILE
from vmsilod.network.links import open_links
from vmsilod.network.plan import NetworkPlan
from vmsilod.network.planning import plan_network
from vmsilod.network.sight import host_ports, judge, look
from vmsilod.network.taps import open_queues
from vmsilod.waiting import Lock

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from vmsilod.bus.views import NetworkView
    from vmsilod.config.model import VmConfig
    from vmsilod.config.schema import GlobalConfig
    from vmsilod.network.plan import Network, Port
    from vmsilod.network.switch import Switches

log = logging.getLogger(__name__)

HINT = "journalctl -u vmsilod"


@dataclass(frozen=True)
class OpenPort:
    """A port with its TAP open: a descriptor per queue, which belong to whoever holds this."""

    port: Port
    tap_fds: list[int] = field(default_factory=list)


class NetworkPool:
    """`_running` has what each running VM was started with, None where that cannot be told."""

    def __init__(self, switches: Switches, lent_file: Path = LENT_FILE) -> None:
        self._switches = switches
        self._lent_file = lent_file
        self._settings: GlobalConfig | None = None
        self._configured: dict[str, VmConfig] = {}
        self._running: dict[str, VmConfig | None] = {}
        self._plan = NetworkPlan()
        self._settled: Settled | None = None  # before the first apply
        self._obstacles: tuple[str, ...] = ()
        self._lock = Lock()
        self._checking = False

    async def apply(self, settings: GlobalConfig | None, vms: Mapping[str, VmConfig]) -> None:
        """Take over a configuration; each VM's `vmm` is the one that it will have. With a broken global file
        the last settings stay. Never fails: what is wrong is told, and to whoever starts.
        """
        async with self._lock:
            self._settings = settings or self._settings
            self._configured = dict(vms)
            await self._settle()

    async def add(self, name: str, config: VmConfig) -> None:
        """One more VM, as apply; nothing is done for one without interfaces."""
        async with self._lock:
            self._configured[name] = config
            if config.network.interfaces:
                await self._settle()

    async def remove(self, name: str) -> None:
        async with self._lock:
            config = self._configured.pop(name, None)
            if config is not None and config.network.interfaces:
                await self._settle()

    async def open(self, vm: str) -> list[OpenPort]:
        """In the order of the VM's configuration; [] for an offline VM. Raises StartFailed."""
        async with self._lock:
            withheld = dict(self._plan.withheld)
            if not self.ports_of(vm) and vm not in withheld:
                return []
            if fault := withheld.get(vm, "") or await self._find_fault(self._host_ports_of(vm)):
                # Once more, from the ground: what was in the way may be gone.
                await self._settle()
                withheld = dict(self._plan.withheld)
                fault = withheld.get(vm, "") or await self._find_fault(self._host_ports_of(vm))
            if fault:
                raise StartFailed(f"the network of VM '{vm}' is not in place: {fault}", HINT)
            opened = await self._open_all(self.ports_of(vm))
            self._running[vm] = self._configured[vm]
            return opened

    async def close(self, vm: str) -> None:
        """The VM has ended. Never fails. What its VMM may have changed of a TAP ends with that TAP."""
        if vm not in self._running:
            return
        async with self._lock:
            ports = self._host_ports_of(vm)
            started = self._running.pop(vm, None)
            await self._release_macvtaps(self.ports_of(vm))
            if (
                started is None
                or self._make_plan() != self._plan
                or await loop.in_worker(_are_changed, ports)
            ):
                await self._settle()

    async def attach(self, vm: str, config: VmConfig, interface: str) -> OpenPort:
        """A VM that runs is to have this interface too: `config` is what it has from then on. Raises a
        VmsiloError, and then all is as before.
        """
        async with self._lock:
            before = dict(self._running)
            self._running[vm] = config
            try:
                self._refuse_taken()
                await self._settle()
                (port,) = (port for port in self.ports_of(vm) if port.interface == interface)
                fault = await self._find_fault([port] if port in host_ports(self._plan) else [])
                if fault:
                    raise Failed(f"interface '{interface}' of VM '{vm}' is not in place: {fault}", HINT)
                (opened,) = await self._open_all([port])
            except BaseException:
                self._running = before
                await self._settle()
                raise
            return opened

    async def detach(self, vm: str, config: VmConfig, interface: str) -> None:
        """A VM that runs has this interface no more: `config` is what it has left. Never fails. Where its
        VMM has not let go of the TAP, that one is down until the VM's end.
        """
        async with self._lock:
            self._running[vm] = config
            gone = [port for port in self.ports_of(vm) if port.interface == interface]
            await self._release_macvtaps(gone)
            await self._settle()

    async def repair(self, running: Mapping[str, VmConfig | None]) -> None:
        """At start: the VMs that run, with what they were started with, as far as it is known."""
        async with self._lock:
            self._running = dict(running)
            try:
                await loop.in_worker(macvtap.release_others, frozenset(running))
            except VmsiloError as error:
                log.error("%s", error)

    def ports_of(self, vm: str) -> tuple[Port, ...]:
        """Those that a start would get now, or that the running VM has."""
        return self._plan.ports_of(vm)

    def find_networks(self) -> Iterator[Network]:
        """In which some VM or the host's side of it has an address."""
        for port in self._plan.ports:
            for address in (*port.host_addresses, *port.addresses):
                yield address.network

    async def find_views(self, vm: str) -> list[NetworkView]:
        """In the order of the VM's configuration. Raises Failed."""
        ports = self.ports_of(vm)
        here = [port for port in ports if not port.network]
        faults = self._settled.faults if self._settled is not None else {}
        ask = partial(traffic.find_views, here, faults, running=vm in self._running)
        views = await loop.in_worker(ask) if here else []
        views += await self._switches.find_views([port for port in ports if port.network])
        order = [port.interface for port in ports]
        return sorted(views, key=lambda view: order.index(view.interface))

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
            open_macvtaps = [port for port in self._plan.ports if port.link and port.vm in self._running]
            try:
                await loop.in_worker(installed.ensure_filters, open_macvtaps)
            except VmsiloError as error:
                log.error("%s", error)
            rules = self._settled.rules
            if not rules or not await loop.in_worker(installed.find_fault, rules):
                return
            log.error("somebody removed or changed vmsilo's network rules; installing them again")
            await loop.in_worker(batch.stop_forwarding, self._plan)
            await self._settle()

    async def _guard_links(self) -> None:
        async with self._lock:
            assert self._settled is not None
            ports = host_ports(self._plan)
            if ports and not await loop.in_worker(_is_as_settled, ports, self._settled, self._lent_file):
                await self._settle()

    def _refuse_taken(self) -> None:
        """Of two VMs that run the plan would leave one without any port."""
        for vm, fact in self._make_plan().withheld:
            if vm in self._running:
                raise Busy(fact, "the one that runs has to stop first, or to be given something else")

    async def _find_fault(self, ports: Sequence[Port]) -> str:
        """Why these of the host's own network must not be used."""
        if self._settled is None:
            return "it has not been set up yet"
        if not ports:
            return ""
        if self._settled.rules_fault:
            return f"its rules cannot be installed: {self._settled.rules_fault}"
        known = [self._settled.faults[port.tap] for port in ports if port.tap in self._settled.faults]
        found = [*known, *(await loop.in_worker(_find_faults, ports)).values()]
        return found[0] if found else await loop.in_worker(installed.find_fault, self._settled.rules)

    def _host_ports_of(self, vm: str) -> tuple[Port, ...]:
        return tuple(port for port in host_ports(self._plan) if port.vm == vm)

    async def _open_all(self, ports: Sequence[Port]) -> list[OpenPort]:
        opened: list[OpenPort] = []
        try:
            for port in ports:
                if port.link:
                    fds = await loop.in_worker(macvtap.acquire, port, nft.load)
                elif port.network:
                    fds = await self._switches.open(port)
                else:
                    fds = await loop.in_worker(_open_port, port)
                opened.append(OpenPort(port, fds))
        except BaseException:
            for fd in (fd for each in opened for fd in each.tap_fds):
                os.close(fd)
            await self._release_macvtaps([each.port for each in opened])
            raise
        return opened

    async def _release_macvtaps(self, ports: Sequence[Port]) -> None:
        try:
            await loop.in_worker(_release_macvtaps, [port for port in ports if port.link])
        except VmsiloError as error:
            log.error("%s", error)

    def _make_plan(self) -> NetworkPlan:
        running = {name: config for name, config in self._running.items() if config is not None}
        return plan_network(self._settings, self._configured, running)

    async def _settle(self) -> None:
        self._plan = self._make_plan()
        for vm, fact in self._plan.withheld:
            log.warning("VM %s cannot be started for now: %s", vm, fact)
        before = self._settled or Settled()
        settled = await loop.in_worker(batch.settle, self._plan, frozenset(self._running), self._lent_file)
        for tap, fault in settled.faults.items():
            if before.faults.get(tap) != fault:
                log.error("%s", fault)
        if settled.rules_fault and settled.rules_fault != before.rules_fault:
            log.error("the network rules cannot be installed: %s", settled.rules_fault)
        self._settled = settled
        if settled.ruled.nat_interface and settled.rules:
            await self._tell_obstacles()
        await self._switches.apply(self._plan)

    async def _tell_obstacles(self) -> None:
        obstacles = await loop.in_worker(installed.find_obstacles)
        if obstacles and obstacles != self._obstacles:
            log.warning(
                "VMs may not reach the internet: what is forwarded is dropped by %s (docs/networks.md has"
                " the rule that cures it)",
                ", ".join(obstacles),
            )
        self._obstacles = obstacles


def _release_macvtaps(ports: Sequence[Port]) -> None:
    """Blocks."""
    for port in ports:
        macvtap.release(port.vm, port.interface)
    installed.remove_filters(ports)


def _open_port(port: Port) -> list[int]:
    """Blocks."""
    with open_links() as links:
        link = links.find_all().get(port.tap)
    if link is None or link.tap is None or link.tap.queues:
        # Of one with a single queue the kernel says so itself.
        raise StartFailed(f"cannot open the TAP '{port.tap}': another process has it open")
    return open_queues(port, link.index)


def _find_faults(ports: Sequence[Port]) -> dict[str, str]:
    """Blocks."""
    if not ports:
        return {}
    with open_links() as links:
        sight = look(links)
    return {port.tap: fault for port in ports if (fault := judge(sight, port))}


def _is_as_settled(ports: Sequence[Port], settled: Settled, lent_file: Path) -> bool:
    """Blocks. False also where trying again may help, and where the host is in other networks by now."""
    try:
        if _find_faults(ports) != dict(settled.judged) or not batch.lends(settled.ruled):
            return False
        return not settled.ruled.ports or batch.render(settled.ruled, lent_file) == settled.rules
    except VmsiloError as error:
        log.error("%s", error)
        return True


def _are_changed(ports: Sequence[Port]) -> bool:
    """Blocks."""
    try:
        return bool(_find_faults(ports))
    except VmsiloError:
        return True
