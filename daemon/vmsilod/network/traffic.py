"""What passes a VM's interfaces, for people: link state, bytes both ways, what the rules refused.

Called by the pool, in a worker. It changes nothing. Counters of a TAP begin anew with the TAP; those of the
rules whenever they are installed anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsilod.errors import VmsiloError
from vmsilod.network import installed
from vmsilod.network.links import open_links
from vmsilod.network.sight import judge, look

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmsilod.network.plan import Port


@dataclass(frozen=True)
class PortView:
    """`received` and `sent` are bytes as the VM sees them; `state` is up (the VM has it open), idle (nobody
    has), down or broken, with `problem` for people. `denied` counts packets of the VM that the rules refused.
    """

    interface: str
    tap: str
    mac: str
    state: str
    problem: str = ""
    received: int = 0
    sent: int = 0
    denied: int = 0


def find_views(ports: Sequence[Port], faults: Mapping[str, str]) -> list[PortView]:
    with open_links() as links:
        sight = look(links)
    try:
        denied = installed.find_denials()
    except VmsiloError:
        denied = {}
    views = []
    for port in ports:
        problem = faults.get(port.tap, "") or judge(sight, port)
        link = sight.links.get(port.tap)
        base = PortView(
            port.interface, port.tap, port.mac, "broken", problem, denied=denied.get(port.tap, 0)
        )
        if link is None:
            views.append(base)
            continue
        state = "broken" if problem else ("up" if link.carrier else "idle")
        views.append(
            PortView(
                *(port.interface, port.tap, port.mac, state, problem),
                received=link.traffic.tx_bytes,
                sent=link.traffic.rx_bytes,
                denied=base.denied,
            )
        )
    return views
