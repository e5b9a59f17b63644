"""Network devices over rtnetlink: what is there, and the few changes that vmsilo makes.

pyroute2 takes any keyword without a word, and swallows those that it does not know; only the functions of
this module call it, and what matters is read back by `find_all`. Used by the batch and the switch, in a
worker: a `Links` belongs to one thread and one step of work, in the network namespace of that thread.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_interface
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsilod.network.rtnetlink import open_session, translated

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmsilod.network.plan import Interface

OURS = 0x766D
"""The link group of vmsilo's devices: "vm"."""
DOOMED = OURS + 1
"""Of those that the next group delete removes: one by one costs 16 ms each."""

_UP = 0x1
_NODAD = 0x02  # linux/if_addr.h
_LINK_SCOPE = 253


@dataclass(frozen=True)
class TapShape:
    """What can be told from outside of a TAP. `queues` are the open ones, of multi-queue TAPs alone."""

    owner: int | None
    group: int | None
    vnet_hdr: bool
    pi: bool
    persistent: bool
    multi_queue: bool
    queues: int = 0

    def same_but_queues(self, other: TapShape) -> bool:
        return replace(self, queues=0) == replace(other, queues=0)


@dataclass(frozen=True)
class Traffic:
    """Bytes and packets as the host counts them: what it received came from the VM."""

    rx_bytes: int = 0
    tx_bytes: int = 0
    rx_packets: int = 0
    tx_packets: int = 0


@dataclass(frozen=True)
class Link:
    """`master` is the number of the bridge, 0 for none; `isolated` of a bridge's port."""

    index: int
    name: str
    kind: str
    group: int
    alias: str
    mac: str
    up: bool
    carrier: bool
    master: int
    isolated: bool
    tap: TapShape | None
    traffic: Traffic


class Links:
    """One netlink socket. Raises Failed."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket

    def find_all(self) -> dict[str, Link]:
        with translated("read the network devices"):
            return {link.name: link for link in map(_parse_link, self._socket.get_links())}

    def find_addresses(self) -> dict[int, frozenset[Interface]]:
        """Of all devices, by number, without link-local ones that the kernel gives."""
        found: dict[int, set[Interface]] = {}
        with translated("read the network addresses"):
            for message in self._socket.get_addr():
                if message["scope"] == _LINK_SCOPE:
                    continue
                text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
                found.setdefault(message["index"], set()).add(ip_interface(f"{text}/{message['prefixlen']}"))
        return {index: frozenset(addresses) for index, addresses in found.items()}

    def mark(self, index: int, *, alias: str, mac: str) -> None:
        """Make a device vmsilo's, with the host's end of it having that address."""
        with translated(f"mark device {index}"):
            self._socket.link("set", index=index, group=OURS, ifalias=alias, address=mac)

    def set_alias(self, index: int, alias: str) -> None:
        with translated(f"mark device {index}"):
            self._socket.link("set", index=index, ifalias=alias)

    def set_state(self, index: int, *, up: bool) -> None:
        with translated(f"set device {index} {'up' if up else 'down'}"):
            self._socket.link("set", index=index, state="up" if up else "down")

    def join_bridge(self, index: int, bridge: int) -> None:
        """Or leave it, with 0."""
        with translated(f"set the bridge of device {index}"):
            self._socket.link("set", index=index, master=bridge)

    def isolate(self, index: int) -> None:
        """A bridge's port that reaches no other isolated port."""
        with translated(f"isolate device {index}"):
            self._socket.brport("set", index=index, isolated=1)

    def add_address(self, index: int, address: Interface) -> None:
        flags = {"flags": _NODAD} if address.version == 6 else {}
        with translated(f"give device {index} the address {address}"):
            self._socket.addr(
                "add",
                index=index,
                address=str(address.ip),
                prefixlen=address.network.prefixlen,
                **flags,
            )

    def remove_address(self, index: int, address: Interface) -> None:
        with translated(f"take the address {address} from device {index}"):
            self._socket.addr(
                "del", index=index, address=str(address.ip), prefixlen=address.network.prefixlen
            )

    def delete(self, links: list[Link]) -> None:
        """In one go, but never what somebody else has put into the group."""
        for link in links:
            with translated(f"remove '{link.name}'"):
                self._socket.link("set", index=link.index, group=DOOMED)
        ours = {link.index for link in links}
        strangers = [
            link for link in self.find_all().values() if link.group == DOOMED and link.index not in ours
        ]
        if not strangers:
            with translated("remove TAPs"):
                self._socket.link("del", group=DOOMED)
            return
        for link in links:
            with translated(f"remove '{link.name}'"):
                self._socket.link("del", index=link.index)


def has_devices(root: Path = Path("/sys/class/net")) -> bool:
    """Whether there is any of vmsilo's. Cheap: this host may have no VM with a network at all."""
    for path in root.glob("*/netdev_group"):
        try:
            if int(path.read_text(), 0) in (OURS, DOOMED):
                return True
        except (OSError, ValueError):
            continue  # it went just now
    return False


@contextmanager
def open_links() -> Iterator[Links]:
    with open_session() as session:
        yield Links(session)


def _parse_link(message: Any) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    kind = info.get_attr("IFLA_INFO_KIND") if info is not None else None
    stats = message.get_attr("IFLA_STATS64") or {}
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        kind=kind or "",
        group=message.get_attr("IFLA_GROUP") or 0,
        alias=message.get_attr("IFLA_IFALIAS") or "",
        mac=message.get_attr("IFLA_ADDRESS") or "",
        up=bool(message["flags"] & _UP),
        carrier=bool(message.get_attr("IFLA_CARRIER")),
        master=message.get_attr("IFLA_MASTER") or 0,
        isolated=_is_isolated(info),
        tap=_parse_tap(info) if kind == "tun" else None,
        traffic=Traffic(
            *(stats.get(name, 0) for name in ("rx_bytes", "tx_bytes", "rx_packets", "tx_packets"))
        ),
    )


def _is_isolated(info: Any) -> bool:
    port = info.get_attr("IFLA_INFO_SLAVE_DATA") if info is not None else None
    if port is None or info.get_attr("IFLA_INFO_SLAVE_KIND") != "bridge":
        return False
    return bool(port.get_attr("IFLA_BRPORT_ISOLATED"))


def _parse_tap(info: Any) -> TapShape | None:
    """None for a TUN."""
    data = info.get_attr("IFLA_INFO_DATA")
    if data is None or data.get_attr("IFLA_TUN_TYPE") != 2:
        return None
    return TapShape(
        owner=data.get_attr("IFLA_TUN_OWNER"),
        group=data.get_attr("IFLA_TUN_GROUP"),
        vnet_hdr=bool(data.get_attr("IFLA_TUN_VNET_HDR")),
        pi=bool(data.get_attr("IFLA_TUN_PI")),
        persistent=bool(data.get_attr("IFLA_TUN_PERSIST")),
        multi_queue=bool(data.get_attr("IFLA_TUN_MULTI_QUEUE")),
        queues=data.get_attr("IFLA_TUN_NUM_QUEUES") or 0,
    )
