"""What passes a VM's interfaces, for people: link state, bytes both ways, what the rules refused.

Called by the pool, in a worker. It changes nothing. Counters of a TAP begin anew with the TAP; those of the
rules whenever they are installed anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsilod.bus.views import NetworkView
from vmsilod.errors import VmsiloError
from vmsilod.network import installed
from vmsilod.network.links import open_links
from vmsilod.network.sight import is_ours, judge, look

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmsilod.network.plan import Port
    from vmsilod.network.sight import Sight


def find_views(ports: Sequence[Port], faults: Mapping[str, str]) -> list[NetworkView]:
    with open_links() as links:
        sight = look(links)
    try:
        denied = installed.find_denials()
    except VmsiloError:
        denied = {}
    return [_view_of(port, sight, faults.get(port.tap, ""), denied.get(port.tap, 0)) for port in ports]


def _view_of(port: Port, sight: Sight, fault: str, denied: int) -> NetworkView:
    problem = fault or judge(sight, port)
    link = sight.links.get(port.tap)
    received = sent = 0
    state = "broken"
    if link is not None and is_ours(link):
        received, sent = link.traffic.tx_bytes, link.traffic.rx_bytes
        state = "broken" if problem else ("up" if link.carrier else "idle")
    return NetworkView(
        *(port.interface, port.tap, port.mac, state, problem), received=received, sent=sent, denied=denied
    )
