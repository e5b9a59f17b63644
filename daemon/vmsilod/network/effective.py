"""Which ports are to be there now: those of the configuration, except that a running VM keeps what it was
started with. Pure; called by the pool.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from vmsilod.network.plan import NetworkPlan, Port

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class Effective:
    """`refused`: VMs whose ports have to wait for a running VM's end, and why."""

    plan: NetworkPlan = field(default_factory=NetworkPlan)
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def merge(plan: NetworkPlan, held: Mapping[str, tuple[Port, ...]]) -> Effective:
    """`held` has the ports of each running VM. What holds for a running VM at once: allow, nameservers, NAT."""
    ports: list[Port] = []
    for vm, started in held.items():
        now = {(port.interface, port.tap): port for port in plan.ports_of(vm)}
        ports += [_with_live_parts(port, now.get((port.interface, port.tap))) for port in started]
    users = {use: port.vm for port in ports for use in _uses(port)}
    refused: dict[str, str] = {}
    waiting: list[Port] = []
    for port in plan.ports:
        if port.vm in held:
            continue
        taken = next((use for use in _uses(port) if use in users), None)
        if taken is None:
            waiting.append(port)
        else:
            kind, value = taken
            refused[port.vm] = f"the running VM '{users[taken]}' still has the {kind} {value}"
    ports += [port for port in waiting if port.vm not in refused]
    order = {(port.vm, port.interface): number for number, port in enumerate(plan.ports)}
    ports.sort(key=lambda port: order.get((port.vm, port.interface), len(order)))
    return Effective(NetworkPlan(tuple(ports), plan.nat_interface), MappingProxyType(refused))


def _with_live_parts(started: Port, now: Port | None) -> Port:
    if now is None:
        return started
    return replace(started, allow=now.allow, nameservers=now.nameservers)


def _uses(port: Port) -> Iterable[tuple[str, str]]:
    """What no two ports may have at once, as far as it is not known from the configuration alone."""
    yield "TAP", port.tap
    place = port.network or port.bridge
    yield ("MAC address", f"{port.mac} on {place}" if place else port.mac)
    for address in port.addresses:
        yield "address", f"{address.ip} on {place}" if place else str(address.ip)
    for address in port.host_addresses:
        yield "host address", str(address.ip)
