"""What passes a VM's interfaces, for people: link state, bytes both ways, what the rules refused and why.

Called by the pool, in a worker, and for the ports of VM-to-VM networks by the switch, in a thread that is in
the network's namespace. It changes nothing. Counters of a TAP begin anew with the TAP; those of the rules
stay with it over a change of the rules, but for VM-to-VM networks and macvtaps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsilod.bus.views import NetworkView
from vmsilod.errors import VmsiloError
from vmsilod.network import installed, macvtap
from vmsilod.network.links import open_links
from vmsilod.network.sight import fits, host_ports_in, is_ours, judge, look

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmsilod.network.links import Link
    from vmsilod.network.plan import Port

LIED = "spoofed"
"""Of the rules that count all kinds of lies together."""


def find_views(ports: Sequence[Port], faults: Mapping[str, str], *, running: bool) -> list[NetworkView]:
    """Of ports in the host's own network: TAPs and macvtaps. Raises Failed."""
    with open_links() as links:
        sight = look(links)
    hosted = host_ports_in(ports)
    counts = _read_counts() if hosted else {}
    views = []
    for port in ports:
        link = sight.links.get(port.tap)
        if port in hosted:
            problem = faults.get(port.tap, "") or judge(sight, port)
            kinds = counts.get(port.tap, {})
            views.append(_view_of(port, link if link and is_ours(link) else None, problem, kinds))
        else:
            views.append(_view_macvtap(port, link, running=running))
    return views


def find_port_views(ports: Sequence[Port], fault: str) -> list[NetworkView]:
    """Of ports of one VM-to-VM network, whose namespace this thread is in. Raises Failed."""
    with open_links() as links:
        found = links.find_all()
    counts = _read_counts()
    views = []
    for port in ports:
        link = found.get(port.tap)
        problem = fault
        if link is None:
            problem = problem or f"the TAP '{port.tap}' does not exist"
        elif not fits(link, port) or not link.up:
            problem = problem or f"the TAP '{port.tap}' is not as vmsilo made it"
        lies = counts.get(port.tap, {}).get("denied", 0)
        views.append(_view_of(port, link, problem, {LIED: lies}))
    return views


def describe_port(
    port: Port, state: str, problem: str = "", *, passed: tuple[int, int] = (0, 0), kinds: Mapping[str, int]
) -> NetworkView:
    """`passed`: bytes to the VM, and from it."""
    return NetworkView(
        *(port.interface, port.tap, port.mac, state, problem),
        kind="vm-switch" if port.network else "macvtap" if port.link else "tap",
        network=port.network or port.link or port.bridge,
        received=passed[0],
        sent=passed[1],
        denied=kinds.get("denied", 0),
        dropped={kind: count for kind, count in kinds.items() if count and kind != "denied"},
    )


def _view_of(port: Port, link: Link | None, problem: str, kinds: Mapping[str, int]) -> NetworkView:
    if link is None:
        return describe_port(port, "broken", problem, kinds=kinds)
    state = "broken" if problem else ("up" if link.carrier else "idle")
    # What the host has sent by it the VM has received.
    passed = (link.traffic.tx_bytes, link.traffic.rx_bytes)
    return describe_port(port, state, problem, passed=passed, kinds=kinds)


def _view_macvtap(port: Port, link: Link | None, *, running: bool) -> NetworkView:
    """It is there while its VM runs. Its counters are the guest's: what it receives, the guest does."""
    if link is None or link.alias != macvtap.alias_of(port):
        problem = f"the macvtap '{port.tap}' does not exist" if running else ""
        return describe_port(port, "broken" if running else "idle", problem, kinds={})
    if link.up:
        state, problem = "up", "" if link.carrier else f"'{port.link}' has no carrier"
    else:
        state, problem = "broken", f"the macvtap '{port.tap}' is down"
    passed = (link.traffic.rx_bytes, link.traffic.tx_bytes)
    return describe_port(port, state, problem, passed=passed, kinds={LIED: _read_refused(port)})


def _read_counts() -> Mapping[str, Mapping[str, int]]:
    try:
        return installed.find_drops()
    except VmsiloError:
        return {}


def _read_refused(port: Port) -> int:
    try:
        return installed.find_refused(port)
    except VmsiloError:
        return 0
