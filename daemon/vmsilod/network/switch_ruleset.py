"""The firewall of one VM-to-VM network, as one text for `nft -f -`: who may send what on which port, and
that nothing but its ports takes part.

Pure; called by the switch's batch, which loads it in the network's namespace before any port is up. What a
frame costs does not grow with the number of ports: one look into a set for each question. There is no
connection tracking.

The text names devices that must exist, and copies of broadcasts go to device *numbers*: it has to be loaded
again when a device was made anew. Therefore the numbers go into its digest.
"""

from __future__ import annotations

import hashlib
from ipaddress import IPv6Address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vmsilod.network.plan import Network, Port

TABLE = "vmsilo"
COUNTERS = ("bad_mac", "bad_protocol", "bad_arp", "bad_ipv4", "bad_ipv6", "bad_nd")
"""What a frame was dropped for, each a counter of the table `netdev vmsilo`."""

_LINK_LOCAL = int(IPv6Address("fe80::"))


def render_switch_ruleset(ports: Sequence[Port], devices: Mapping[str, int]) -> str:
    """`devices`: every TAP of the namespace with its number, at least one. One that is not of `ports` passes
    nothing.
    """
    body = _render_netdev(ports, sorted(devices)) + _render_inet(ports)
    seal = hashlib.sha256(f"{body}{sorted(devices.items())}".encode()).hexdigest()
    # `add`, then `delete`: the whole of it is replaced in one transaction, also where there was nothing.
    start = "".join(
        f"{verb} table {family} {TABLE}\n" for family in ("netdev", "inet") for verb in ("add", "delete")
    )
    return start + body.replace("SEAL", seal)


def seal_of(ruleset: str) -> str:
    """The digest by which a loaded ruleset is told to be this one: the comment of both its tables."""
    return ruleset.partition('comment "')[2].partition('"')[0]


def eui64_of(mac: str) -> IPv6Address:
    """The link-local address that a guest makes of its MAC (RFC 4291, appendix A)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    return IPv6Address(
        _LINK_LOCAL | int.from_bytes(bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:], "big")
    )


def _render_netdev(ports: Sequence[Port], devices: Sequence[str]) -> str:
    """Every frame of a guest, before any protocol sees it."""
    hooked = ", ".join(f'"{tap}"' for tap in devices)
    return f"""table netdev {TABLE} {{
	comment "SEAL"
{_render_counters()}
{_render_set("denied", "ifname", (f'"{tap}"' for tap in devices), "counter; ")}
{_render_pairs("macs", "ether_addr", ((port.tap, port.mac) for port in ports))}
{_render_pairs("own4", "ipv4_addr", _own(ports, 4))}
{_render_pairs("own6", "ipv6_addr", _own(ports, 6))}
{_render_set("all4", "ipv4_addr", (str(value) for _, value in _own(ports, 4)))}
{_render_set("all6", "ipv6_addr", (str(value) for _, value in _own(ports, 6)))}
{_render_pairs("served4", "ipv4_addr", _served(ports, 4), interval=True)}
{_render_pairs("served6", "ipv6_addr", _served(ports, 6), interval=True)}
{_render_pairs("local6", "ipv6_addr", ((port.tap, eui64_of(port.mac)) for port in ports))}
{_render_port_set("dhcp", [port.tap for port in ports if port.dhcp])}
	chain denied {{
		meta iifname @denied drop
		drop
	}}
	chain broadcast {{
{_render_copies(ports)}		drop
	}}
	chain check_arp {{
		arp htype != 1 counter name bad_arp goto denied
		arp ptype != ip counter name bad_arp goto denied
		meta iifname . arp saddr ether != @macs counter name bad_arp goto denied
		# Is the address taken? It cannot be.
		arp saddr ip 0.0.0.0 drop
		meta iifname . arp saddr ip != @own4 counter name bad_arp goto denied
		# Nobody asks a guest: its MAC is known.
		arp operation != request drop
		accept
	}}
	chain check_ip4 {{
		icmp type {{ redirect, router-advertisement }} counter name bad_ipv4 goto denied
		meta iifname . ip saddr @own4 goto from4
		ip saddr @all4 counter name bad_ipv4 goto denied
		meta iifname . ip saddr @served4 goto from4
		ip saddr 0.0.0.0 meta iifname @dhcp udp sport 68 udp dport 67 goto broadcast
		counter name bad_ipv4 goto denied
	}}
	chain from4 {{
		ether daddr ff:ff:ff:ff:ff:ff goto broadcast
		ip daddr {{ 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0-255.255.255.255 }} drop
		accept
	}}
	chain check_ip6 {{
		icmpv6 type nd-neighbor-solicit goto solicit
		icmpv6 type {{ nd-router-advert, nd-redirect }} counter name bad_nd goto denied
		meta iifname . ip6 saddr @own6 goto from6
		ip6 saddr @all6 counter name bad_ipv6 goto denied
		meta iifname . ip6 saddr @served6 goto from6
		# What every host says of itself: it concerns nobody here, and is no lie.
		meta iifname . ip6 saddr @local6 drop
		ip6 saddr :: ip6 daddr ff00::/8 drop
		counter name bad_ipv6 goto denied
	}}
	chain from6 {{
		# Nobody asks a guest: its MAC is known.
		icmpv6 type nd-neighbor-advert drop
		ip6 daddr {{ ::/127, fe80::/10, ff00::/8 }} drop
		accept
	}}
	chain solicit {{
		ip6 saddr :: drop
		meta iifname . ip6 saddr @own6 accept
		meta iifname . ip6 saddr @local6 accept
		counter name bad_nd goto denied
	}}
	chain ingress {{
		type filter hook ingress devices = {{ {hooked} }} priority -500; policy drop;
		meta iifname . ether saddr != @macs counter name bad_mac goto denied
		ether type vmap {{ arp : goto check_arp, ip : goto check_ip4, ip6 : goto check_ip6 }}
		counter name bad_protocol goto denied
	}}
}}
"""


def _render_inet(ports: Sequence[Port]) -> str:
    """What the namespace's own stack does with them: forward between two ports, and answer ND."""
    pairs = _render_pairs("hairpins", "ifname", ((port.tap, f'"{port.tap}"') for port in ports))
    return f"""table inet {TABLE} {{
	comment "SEAL"
{_render_port_set("ports", [port.tap for port in ports])}
{pairs}
	chain input {{
		type filter hook input priority 0; policy drop;
		meta iifname @ports icmpv6 type nd-neighbor-solicit accept
	}}
{_render_way_back(ports)}	chain forward {{
		type filter hook forward priority 0; policy drop;
		# A router VM that is asked for what it does not know would send it back until its time is over.
		meta iifname . meta oifname @hairpins drop
		meta iifname @ports meta oifname @ports accept
	}}
	chain output {{
		type filter hook output priority 0; policy drop;
		icmp type {{ destination-unreachable, time-exceeded, parameter-problem }} accept
		icmpv6 type {{ nd-neighbor-advert, destination-unreachable, packet-too-big, time-exceeded, \
parameter-problem }} accept
	}}
}}
"""


def _render_way_back(ports: Sequence[Port]) -> str:
    """Of two routers, one with a network that lies within the other's, each is held to its own."""
    if not any(port.served for port in ports):
        return ""
    return """\
	chain prerouting {
		type filter hook prerouting priority -300; policy accept;
		ip6 saddr fe80::/10 accept
		fib saddr . iif oif missing drop
	}
"""


def _own(ports: Sequence[Port], version: int) -> Iterable[tuple[str, object]]:
    return ((port.tap, own.ip) for port in ports for own in port.addresses if own.version == version)


def _served(ports: Sequence[Port], version: int) -> Iterable[tuple[str, object]]:
    """One that is within another is left out, since nft refuses both."""
    for port in ports:
        networks = [network for network in dict.fromkeys(port.served) if network.version == version]
        for network in networks:
            if not any(other != network and _covers(other, network) for other in networks):
                yield port.tap, network


def _covers(outer: Network, inner: Network) -> bool:
    return outer.prefixlen <= inner.prefixlen and inner.network_address in outer


def _render_counters() -> str:
    return "\n".join(f"\tcounter {name} {{ }}" for name in COUNTERS)


def _render_port_set(name: str, taps: Sequence[str]) -> str:
    return _render_set(name, "ifname", (f'"{tap}"' for tap in taps))


def _render_set(name: str, kind: str, values: Iterable[str], more: str = "") -> str:
    listed = ", ".join(dict.fromkeys(values))
    elements = f"elements = {{ {listed} }}; " if listed else ""
    return f"\tset {name} {{ type {kind}; {more}{elements}}}"


def _render_pairs(
    name: str, kind: str, pairs: Iterable[tuple[str, object]], *, interval: bool = False
) -> str:
    values = (f'"{tap}" . {value}' for tap, value in pairs)
    return _render_set(name, f"ifname . {kind}", values, "flags interval; " if interval else "")


def _render_copies(ports: Sequence[Port]) -> str:
    return "".join(
        f'\t\tmeta iifname != "{port.tap}" dup to "{port.tap}"\n' for port in ports if port.receive_broadcast
    )
