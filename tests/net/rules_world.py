"""What the tests of the firewall share: VMs on real TAPs with our rules, and machines around the host.

a-0, b-0   routed VMs          wan   the internet: a router at 198.51.100.1, behind it 203.0.113.9
c-0, d-0   VMs in the bridge   lan   a machine of the LAN: 192.168.1.7; the bridge br0 is in 192.168.5.0/24
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import ip_interface, ip_network
from typing import TYPE_CHECKING, Self

from net.packets import Way, udp
from net.tap_ground import Tap, ip, peer, run, set_sysctl
from vmsilod.network import nft
from vmsilod.network.names import derive_link_local
from vmsilod.network.plan import Allow, NetworkPlan, Port
from vmsilod.network.ruleset import render_ruleset

if TYPE_CHECKING:
    from net.tap_ground import Peer

INTERNET, INTERNET6 = "203.0.113.9", "2001:db8:9::9"
ROUTER, ROUTER6 = "198.51.100.1", "2001:db8:1::1"
WAN, WAN6 = "198.51.100.2", "2001:db8:1::2"
LAN, LAN6, LAN_GLOBAL6 = "192.168.1.7", "fd07::7", "2001:db8:7::7"
HOST_ON_LAN = "192.168.1.2"
OUTSIDE = "02:00:00:00:00:99"

A = Port(
    vm="alpha",
    interface="wan",
    tap="a-0",
    mac="02:00:00:00:00:0a",
    host_addresses=(ip_interface("10.0.1.254/24"), ip_interface("fd00:1::fe/64")),
    addresses=(ip_interface("10.0.1.1/24"), ip_interface("fd00:1::1/64")),
)
B = replace(
    A,
    vm="beta",
    tap="b-0",
    mac="02:00:00:00:00:0b",
    host_addresses=(ip_interface("10.0.2.254/24"), ip_interface("fd00:2::fe/64")),
    addresses=(ip_interface("10.0.2.1/24"), ip_interface("fd00:2::1/64")),
)
C = Port(
    vm="gamma",
    interface="lan",
    tap="c-0",
    mac="02:00:00:00:00:0c",
    bridge="br0",
    addresses=(ip_interface("192.168.5.12/24"), ip_interface("fd05::12/64")),
)
D = replace(
    C,
    vm="delta",
    tap="d-0",
    mac="02:00:00:00:00:0d",
    addresses=(ip_interface("192.168.5.13/24"), ip_interface("2001:db8:5::13/64")),
)
E = Port(
    "epsilon", "wan", "e-0", "02:00:00:00:00:0e", host_addresses=(ip_interface("10.0.3.254/24"),), dhcp=True
)

PROBE = "probe"
"""Another's table behind ours, that counts what a TAP's frames get through."""


def allow(network: str, protocol: str = "", ports: tuple[int, int] | None = None) -> Allow:
    return Allow(ip_network(network), protocol, ports)


def link_local(port: Port) -> str:
    return str(derive_link_local(port.mac))


class World:
    """The host of the test, with these VMs; `peers` are made by the test as it needs them."""

    def __init__(self, *ports: Port, nat: str = "wan") -> None:
        self.plan = NetworkPlan(ports, nat)
        self.taps: dict[str, Tap] = {}
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for port in self.plan.ports:
                self.add_tap(port, stack)
            self.install()
            for port in self.plan.ports:
                ip(f"link set {port.tap} up")
                for own in port.addresses if port.host_addresses else ():
                    ip(f"neigh replace {own.ip} lladdr {port.mac} dev {port.tap}")
            set_sysctl("net/ipv4/ip_forward", "1")
            set_sysctl("net/ipv6/conf/all/forwarding", "1")
            self.probe()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def add_tap(self, port: Port, stack: ExitStack) -> None:
        tap = self.taps[port.tap] = Tap(port.tap)
        stack.callback(tap.close)
        for address in port.host_addresses:
            ip(f"addr add {address} dev {port.tap}{' nodad' if address.version == 6 else ''}")
        if port.bridge:
            ip(f"link set {port.tap} master {port.bridge}")

    def install(self) -> str:
        text = render_ruleset(self.plan, nft.look_around(self.plan))
        nft.apply(text)
        return text

    def change(self, *ports: Port) -> None:
        """Other configurations of the same VMs, while they run."""
        self.plan = replace(self.plan, ports=ports)
        self.install()

    def probe(self) -> None:
        for tap in self.taps:
            run("nft", f"add table netdev {PROBE}")
            hook = f'{{ type filter hook ingress device "{tap}" priority 0; policy accept; }}'
            run("nft", f"add chain netdev {PROBE} {tap} {hook}")
            run("nft", f"add rule netdev {PROBE} {tap} counter")

    def passed(self, tap: str) -> int:
        """Frames of this TAP that our netdev table let through."""
        listed = json.loads(run("nft", "-j", "list", "chain", "netdev", PROBE, tap))["nftables"]
        rule = next(entry["rule"] for entry in listed if "rule" in entry)
        return int(rule["expr"][0]["counter"]["packets"])

    def count(self, interface: str, kind: str) -> int:
        found = nft.read_counts().get(interface, {}).get(kind)
        return found.packets if found else 0

    def kinds(self, interface: str) -> dict[str, int]:
        return {kind: count.packets for kind, count in nft.read_counts().get(interface, {}).items()}

    def way(self, port: Port, destination: str, *, source: str = "") -> Way:
        """From this VM to `destination` by the host."""
        version = 6 if ":" in destination else 4
        own = next((str(own.ip) for own in port.addresses if own.version == version), "")
        return Way(port.mac, self.taps[port.tap].host_mac(), source or own, destination)

    def send(self, port: Port, *frames: bytes) -> None:
        self.taps[port.tap].send(*frames)

    def say(self, port: Port, destination: str, dport: int = 7000) -> None:
        self.send(port, udp(self.way(port, destination), 4000, dport))

    def internet(self) -> Peer:
        made = self.stack.enter_context(peer("wan", f"{ROUTER}/24", f"{ROUTER6}/64"))
        ip(f"addr add {WAN}/24 dev wan")
        ip(f"addr add {WAN6}/64 dev wan nodad")
        ip(f"route add default via {ROUTER}")
        ip(f"route add default via {ROUTER6}")
        made.ip(f"addr add {INTERNET}/32 dev lo")
        made.ip(f"addr add {INTERNET6}/128 dev lo nodad")
        made.ip(f"route add default via {WAN}")
        made.ip(f"route add default via {WAN6}")
        self.install()  # what is nearby has changed
        return made

    def lan(self) -> Peer:
        made = self.stack.enter_context(peer("lan", f"{LAN}/24", f"{LAN6}/64", f"{LAN_GLOBAL6}/64"))
        ip(f"addr add {HOST_ON_LAN}/24 dev lan")
        ip("addr add fd07::2/64 dev lan nodad")
        ip("addr add 2001:db8:7::2/64 dev lan nodad")
        made.ip(f"route add default via {HOST_ON_LAN}")
        made.ip("route add default via fd07::2")
        self.install()
        return made
