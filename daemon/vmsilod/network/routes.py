"""The ways of a VM-to-VM network, over rtnetlink: which address is behind which port, with which MAC, and
who answers for it; and how its ports queue.

Called by the switch's batch, in the thread that is in the network's namespace, on ports that are up. Like
`links.py`: only these functions call pyroute2, which swallows what it does not know; what is there is read
back. A `Ways` belongs to one thread and one step of work.
"""

from __future__ import annotations

import errno
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TYPE_CHECKING, Any

from vmsilod.network.proxies import find_proxies
from vmsilod.network.rtnetlink import open_session, translated

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmsilod.network.plan import Network

    Address = IPv4Address | IPv6Address

# linux/rtnetlink.h, linux/neighbour.h
_MAIN_TABLE = 254
_OF_THE_KERNEL = 2
_PERMANENT = 0x80
_PROXY = 0x08
_FAMILIES = {socket.AF_INET: 4, socket.AF_INET6: 6}


@dataclass(frozen=True)
class Way:
    """Packets for `destination` leave through device `index`, to the MAC of `via`, or to their own."""

    destination: Network
    index: int
    via: Address | None = None


@dataclass(frozen=True)
class Neighbour:
    """`mac` "" for an address that this host answers for on that device."""

    address: Address
    index: int
    mac: str = ""


class Ways:
    """One netlink socket. Raises Failed."""

    def __init__(self, netlink: Any) -> None:
        self._netlink = netlink

    def agree(self, ways: set[Way], neighbours: set[Neighbour]) -> None:
        """Make the routes and the neighbours exactly these. What is wrong goes before the new comes."""
        old_ways, old_neighbours = self.find_ways(), self.find_neighbours()
        for way in old_ways - ways:
            self._route("del", way)
        # A neighbour with another MAC is replaced by the new one.
        kept = {(neighbour.address, neighbour.index, not neighbour.mac) for neighbour in neighbours}
        for neighbour in old_neighbours - neighbours:
            if (neighbour.address, neighbour.index, not neighbour.mac) not in kept:
                self._neighbour("del", neighbour)
        for neighbour in sorted(neighbours - old_neighbours, key=str):
            self._neighbour("replace", neighbour)
        # The ways to hosts first: a `via` needs one.
        for way in sorted(ways - old_ways, key=lambda way: (way.via is not None, str(way))):
            self._route("replace", way)

    def find_ways(self) -> set[Way]:
        """But those that the kernel makes for addresses."""
        found = set()
        with translated("read the routes"):
            for family, version in _FAMILIES.items():
                for message in self._netlink.get_routes(family=family, table=_MAIN_TABLE):
                    if message["proto"] != _OF_THE_KERNEL and message["type"] == 1:
                        found.add(_parse_way(message, version))
        return found

    def find_neighbours(self) -> set[Neighbour]:
        """The permanent ones and those that are answered for."""
        found = set()
        with translated("read the neighbours"):
            for family in _FAMILIES:
                for message in self._netlink.get_neighbours(family=family):
                    if message["state"] & _PERMANENT:
                        mac = message.get_attr("NDA_LLADDR") or ""
                        found.add(
                            Neighbour(ip_address(message.get_attr("NDA_DST")), message["ifindex"], mac)
                        )
        return found | {Neighbour(address, index) for index, address in find_proxies()}

    def find_queueing(self) -> dict[int, str]:
        """The kind of each device's root queue."""
        with translated("read the queues"):
            return {
                message["index"]: message.get_attr("TCA_KIND")
                for message in self._netlink.get_qdiscs()
                if message["parent"] == 0xFFFFFFFF  # TC_H_ROOT
            }

    def queue_fairly(self, index: int) -> bool:
        """fq_codel for what leaves by a device; False where this kernel has none."""
        from pyroute2 import NetlinkError

        with translated(f"set the queue of device {index}"):
            try:
                self._netlink.tc("replace", "fq_codel", index, "1:0")
            except NetlinkError as error:
                if error.code in (errno.ENOENT, errno.EOPNOTSUPP):
                    return False
                raise
        return True

    def limit_ring(self, index: int, frames: int) -> None:
        with translated(f"set the length of device {index}"):
            self._netlink.link("set", index=index, txqlen=frames)

    def _route(self, command: str, way: Way) -> None:
        with translated(f"set the route to {way.destination}"):
            more = {"gateway": str(way.via)} if way.via else {}
            if way.via is None and way.destination.version == 4:
                more["scope"] = "link"
            self._netlink.route(
                command, dst=str(way.destination), oif=way.index, table=_MAIN_TABLE, proto="static", **more
            )

    def _neighbour(self, command: str, neighbour: Neighbour) -> None:
        with translated(f"set the neighbour {neighbour.address}"):
            more: dict[str, Any] = (
                {"lladdr": neighbour.mac, "state": "permanent"} if neighbour.mac else {"flags": _PROXY}
            )
            family = socket.AF_INET if neighbour.address.version == 4 else socket.AF_INET6
            self._netlink.neigh(
                command, family=family, dst=str(neighbour.address), ifindex=neighbour.index, **more
            )


@contextmanager
def open_ways() -> Iterator[Ways]:
    with open_session() as session:
        yield Ways(session)


def _parse_way(message: Any, version: int) -> Way:
    everything = "0.0.0.0" if version == 4 else "::"
    destination = ip_network(f"{message.get_attr('RTA_DST') or everything}/{message['dst_len']}")
    via = message.get_attr("RTA_GATEWAY")
    return Way(destination, message.get_attr("RTA_OIF") or 0, ip_address(via) if via else None)
