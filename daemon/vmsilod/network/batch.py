"""Makes this host's TAPs, their addresses and rules what a plan says, all VMs in one batch.

Called by the pool, in a worker, one at a time. Rules are in place before a link is up. A TAP gets its marks
before it becomes persistent, so whatever dies half-way, the next batch goes on from what is there. Devices
of others are never changed, but for the NAT interface's forwarding.
"""

from __future__ import annotations

import logging
import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from vmsilod.errors import Failed, VmsiloError
from vmsilod.network import forwarding, installed, taps
from vmsilod.network.links import has_devices, open_links
from vmsilod.network.plan import NetworkPlan
from vmsilod.network.sight import (
    alias_of,
    closed_alias_of,
    fits,
    host_mac,
    host_ports,
    is_ours,
    judge,
    judge_bridge,
    look,
    owner_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from vmsilod.network.links import Link, Links
    from vmsilod.network.plan import Port

log = logging.getLogger(__name__)

CHUNK = 128
"""TAPs made at once: each is a descriptor until it is persistent."""


@dataclass(frozen=True)
class Settled:
    """How it is now: `faults` says per TAP why its VM cannot use it, `rules_fault` why none can. `rules` are
    made of `ruled`, which has nothing of devices that are not there or not ours; "" for none.
    """

    ruled: NetworkPlan = field(default_factory=NetworkPlan)
    rules: str = ""
    faults: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    rules_fault: str = ""
    judged: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """What could be read back at the end: when that changes, it is worth trying again."""


def settle(plan: NetworkPlan, running: frozenset[str], lent_file: Path = forwarding.LENT_FILE) -> Settled:
    """The TAPs of `running` VMs are open. Never raises a VmsiloError."""
    ports = host_ports(plan)
    faults: dict[str, str] = {}
    judged: dict[str, str] = {}
    ruled, rules = NetworkPlan(), ""
    if not ports and not has_devices():
        return _clear(lent_file)
    try:
        with open_links() as links:
            batch = _Batch(links, ports, running, faults)
            made = batch.make_taps()
            ruled = batch.reduce(plan)
            try:
                rules = _install(ruled, lent_file, anew=made)
            except VmsiloError as error:
                batch.shut()
                return Settled(ruled, faults=MappingProxyType(faults), rules_fault=error.message)
            batch.configure()
            forwarding.lend_forwarding(_nat_interface(ruled), lent_file)
            judged = batch.judge()
    except VmsiloError as error:
        for port in ports:
            faults.setdefault(port.tap, error.message)
    return Settled(ruled, rules, MappingProxyType(faults), judged=MappingProxyType(judged))


def render(ruled: NetworkPlan, lent_file: Path) -> str:
    """Raises Failed."""
    return installed.render(ruled, forwarding.find_lent(_nat_interface(ruled), lent_file))


def _install(ruled: NetworkPlan, lent_file: Path, *, anew: bool) -> str:
    if not ruled.ports:
        installed.remove_rules()
        return ""
    rules = render(ruled, lent_file)
    installed.ensure_rules(rules, anew=anew)
    return rules


def _clear(lent_file: Path) -> Settled:
    try:
        installed.remove_rules()
        forwarding.lend_forwarding("", lent_file)
    except VmsiloError as error:
        log.error("%s", error)
    return Settled()


def lends(plan: NetworkPlan) -> bool:
    """Whether the NAT interface forwards, if it is there."""
    return forwarding.forwards(_nat_interface(plan))


def _nat_interface(plan: NetworkPlan) -> str:
    return plan.nat_interface if any(port.host_addresses for port in host_ports(plan)) else ""


def stop_forwarding(plan: NetworkPlan) -> None:
    """At once, for a moment without rules; settle() ends it."""
    for port in host_ports(plan):
        try:
            forwarding.forward(port.tap, on=False)
        except Failed as error:
            log.debug("ignoring: %s", error)


class _Batch:
    """One time through; `faults` is filled on the way, by TAP."""

    def __init__(
        self, links: Links, ports: Sequence[Port], running: frozenset[str], faults: dict[str, str]
    ) -> None:
        self._links = links
        self._ports = ports
        self._running = running
        self._faults = faults
        self._sight = look(links)
        self._changed = False
        self._made: frozenset[str] = frozenset()

    def make_taps(self) -> bool:
        """Remove what should not be there and make what is missing, down; whether anything was made."""
        self._remove_unwanted()
        missing = [port for port in self._ports if port.tap not in self._sight.links]
        for first in range(0, len(missing), CHUNK):
            self._make(missing[first : first + CHUNK])
        for port in self._ports:
            # One that is up as it should be was restrained before it was.
            if port.tap in self._faults or not judge(self._sight, port):
                continue
            try:
                forwarding.restrain_tap(port.tap, ipv6=any(a.version == 6 for a in port.host_addresses))
            except Failed as error:
                self._faults[port.tap] = error.message
        if missing:
            self._sight = look(self._links)
            self._made = frozenset(port.tap for port in missing)
        return bool(missing)

    def reduce(self, plan: NetworkPlan) -> NetworkPlan:
        """Without the ports that have no TAP of ours."""
        ours = self._sight.ours()
        return replace(plan, ports=tuple(port for port in plan.ports if port.network or port.tap in ours))

    def configure(self) -> None:
        """Addresses, bridges, up, forwarding: the rules are there."""
        for port in self._ports:
            if port.tap in self._faults:
                continue
            try:
                self._configure(port, self._sight.links[port.tap])
            except KeyError:
                self._faults[port.tap] = f"the TAP '{port.tap}' was removed at once"
            except Failed as error:
                self._faults[port.tap] = error.message

    def judge(self) -> dict[str, str]:
        """Read back what has become of it; what is not as it should be is closed."""
        if self._changed:
            self._sight = look(self._links)
        self._restore_addresses()
        found = {port.tap: fault for port in self._ports if (fault := judge(self._sight, port))}
        for port in self._ports:
            if port.tap in found:
                self._faults.setdefault(port.tap, found[port.tap])
            if port.tap in self._faults:
                self._shut(port)
        return found

    def _restore_addresses(self) -> None:
        """udev gives a device that has just come a MAC address of its own (MACAddressPolicy=), once, and may
        have begun to before vmsilo gave it one. No VMM has had these TAPs yet.
        """
        changed = [
            (port, link)
            for port in self._ports
            if port.tap in self._made and (link := self._sight.links.get(port.tap)) is not None
            if link.mac != host_mac(port) and fits(replace(link, mac=host_mac(port)), port)
        ]
        for port, link in changed:
            self._links.mark(link.index, alias=alias_of(port), mac=host_mac(port))
        if changed:
            self._sight = look(self._links)

    def shut(self) -> None:
        """The rules cannot be installed. Older ones of ours hold for what is up; without, nothing may be."""
        if installed.has_rules():
            return
        for port in self._ports:
            self._shut(port)

    def _shut(self, port: Port) -> None:
        link = self._sight.links.get(port.tap)
        if link is not None and is_ours(link):
            self._close(link)

    def _close(self, link: Link) -> None:
        """Down, and out of a bridge: that goes on sending what is for the address of a port that is down."""
        if link.up:
            self._links.set_state(link.index, up=False)
        if link.master:
            self._links.join_bridge(link.index, 0)

    def _remove_unwanted(self) -> None:
        wanted = {port.tap: port for port in self._ports}
        doomed: list[Link] = []
        for name, link in self._sight.links.items():
            port = wanted.get(name)
            if not is_ours(link):
                if port is not None:
                    self._faults[name] = judge(self._sight, port)
            elif owner_of(link) in self._running and not (port is None and not link.carrier):
                self._keep_open(link, port)
            elif port is None or not fits(link, port):
                doomed.append(link)
        if doomed:
            self._links.delete(doomed)
            gone = {link.name for link in doomed}
            self._sight = look(self._links)
            for name in gone & self._sight.links.keys():
                self._faults[name] = f"the TAP '{name}' cannot be removed"

    def _keep_open(self, link: Link, port: Port | None) -> None:
        """A running VM has it: what its VMM has changed or not let go of closes it until the VM's end, also
        if it is changed back, or a VMM could steal what is for others again and again.
        """
        if port is not None and fits(link, port):
            return
        fact = "is no part of its configuration" if port is None else "is not as vmsilo made it"
        self._faults[link.name] = f"the TAP '{link.name}' {fact}"
        closed = closed_alias_of(port) if port is not None else link.alias
        if link.up or link.alias != closed:
            log.error("VM %s: its TAP '%s' %s; it is down", owner_of(link), link.name, fact)
        self._close(link)
        if link.alias != closed:
            self._links.set_alias(link.index, closed)

    def _make(self, ports: Sequence[Port]) -> None:
        with ExitStack() as stack:
            made: list[tuple[Port, int]] = []
            for port in ports:
                try:
                    fd = taps.create_tap(port.tap, queues=port.queues, offload=port.offload)
                except Failed as error:
                    self._faults[port.tap] = error.message
                    continue
                stack.callback(os.close, fd)
                made.append((port, fd))
            for port, fd in made:
                try:
                    forwarding.forward(port.tap, on=False)
                    self._links.mark(
                        socket.if_nametoindex(port.tap), alias=alias_of(port), mac=host_mac(port)
                    )
                    taps.make_persistent(fd)
                except Failed as error:
                    self._faults[port.tap] = error.message
                except OSError as error:
                    self._faults[port.tap] = f"cannot make the TAP '{port.tap}': {error.strerror}"

    def _configure(self, port: Port, link: Link) -> None:
        addresses = self._sight.addresses.get(link.index, frozenset())
        wanted = frozenset(port.host_addresses)
        self._changed = self._changed or bool(judge(self._sight, port))
        for address in addresses - wanted:
            self._links.remove_address(link.index, address)
        self._join(port, link)
        # In the order of the configuration: the kernel prefers the first as its own.
        for address in port.host_addresses:
            if address not in addresses:
                self._links.add_address(link.index, address)
        if not (link.up and link.master == self._bridge_of(port)):
            self._links.set_state(link.index, up=True)
        forwarding.forward(port.tap, on=bool(port.host_addresses))

    def _join(self, port: Port, link: Link) -> None:
        """Isolated before it is up, and so before it is a port that passes anything."""
        if port.bridge and (fault := judge_bridge(self._sight, port)):
            raise Failed(fault)
        bridge = self._bridge_of(port)
        if link.master != bridge:
            if link.up:
                self._links.set_state(link.index, up=False)
            self._links.join_bridge(link.index, bridge)
        if bridge and not (link.master == bridge and link.isolated):
            self._links.isolate(link.index)

    def _bridge_of(self, port: Port) -> int:
        return self._sight.links[port.bridge].index if port.bridge else 0
