"""Whether this host's TAPs are what a plan says: one look at the kernel, and judgements about it.

Called by the batch and the pool, in a worker. It changes nothing. vmsilo's devices are known by their link
group and an alias that names VM and interface, so a vmsilod that starts anew needs no other memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsilod.network.links import DOOMED, OURS, TapShape

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vmsilod.network.links import Link, Links
    from vmsilod.network.plan import Interface, NetworkPlan, Port

ALIAS = "vmsilo:"


@dataclass(frozen=True)
class Sight:
    """`addresses` by number of the device."""

    links: Mapping[str, Link]
    addresses: Mapping[int, frozenset[Interface]]

    def ours(self) -> dict[str, Link]:
        return {name: link for name, link in self.links.items() if is_ours(link)}


def look(links: Links) -> Sight:
    return Sight(links.find_all(), links.find_addresses())


def host_ports(plan: NetworkPlan) -> tuple[Port, ...]:
    """The TAPs of the host's own network; those of VM-to-VM networks are the switch's."""
    return host_ports_in(plan.ports)


def host_ports_in(ports: Iterable[Port]) -> tuple[Port, ...]:
    return tuple(port for port in ports if not port.network and not port.link)


def is_ours(link: Link) -> bool:
    return link.tap is not None and link.group in (OURS, DOOMED) and link.alias.startswith(ALIAS)


def owner_of(link: Link) -> str:
    """The VM that one of our TAPs was made for."""
    return link.alias.removeprefix(ALIAS).partition(":")[0]


def alias_of(port: Port) -> str:
    return f"{ALIAS}{port.vm}:{port.interface}"


def closed_alias_of(port: Port) -> str:
    """Of one that its VMM has changed; it is no port's any more, and the VM's until that has ended."""
    return f"{alias_of(port)}:closed"


def host_mac(port: Port) -> str:
    """Of the host's end: never the guest's, and so high that no bridge takes it for its own."""
    return f"{'fa' if port.mac.startswith('fe') else 'fe'}{port.mac[2:]}"


def fits(link: Link, port: Port) -> bool:
    """Whether it is the TAP that was made for this port, and still as it was made: a VMM could have changed
    all of this by its descriptor.
    """
    shape = TapShape(
        owner=0,
        group=None,
        vnet_hdr=port.offload,
        pi=False,
        persistent=True,
        multi_queue=port.queues > 1,
    )
    return (
        is_ours(link)
        and link.group == OURS
        and link.alias == alias_of(port)
        and link.mac == host_mac(port)
        and link.tap is not None
        and link.tap.same_but_queues(shape)
    )


def judge(sight: Sight, port: Port) -> str:
    """Why this port's VM must not use its TAP as it is; "" where it may."""
    link = sight.links.get(port.tap)
    if link is None:
        return f"the TAP '{port.tap}' does not exist"
    if not is_ours(link):
        return f"there is already a network device '{port.tap}', and it is not vmsilo's"
    if not fits(link, port):
        return f"the TAP '{port.tap}' is not as vmsilo made it"
    if port.bridge and (fault := judge_bridge(sight, port)):
        return fault
    if not link.up:
        return f"the TAP '{port.tap}' is down"
    if sight.addresses.get(link.index, frozenset()) != frozenset(port.host_addresses):
        return f"the TAP '{port.tap}' has not the addresses of its configuration"
    if not port.bridge:
        return "" if link.master == 0 else f"the TAP '{port.tap}' was put into a bridge"
    if link.master != sight.links[port.bridge].index:
        return f"the TAP '{port.tap}' is not in the bridge '{port.bridge}'"
    return "" if link.isolated else f"the TAP '{port.tap}' is not isolated in its bridge"


def judge_bridge(sight: Sight, port: Port) -> str:
    bridge = sight.links.get(port.bridge)
    if bridge is None:
        return f"there is no bridge '{port.bridge}'"
    return "" if bridge.kind == "bridge" else f"'{port.bridge}' is not a bridge of the kernel"
