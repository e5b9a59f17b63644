"""The table `netdev vmsilo`: every frame that comes out of a TAP, before anything of the host sees it.

Pure; rendered for `ruleset.py`. Whatever is not named here as allowed is dropped: by a chain that counts it
per TAP and kind, or else by the policy of the TAP's own chain. What a frame costs does not depend on the
number of VMs: each question is one look into a hash.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsilod.network.names import derive_link_local
from vmsilod.network.rule_text import (
    SIZE,
    allow_rules,
    checked,
    checked_mac,
    host_and_group_allows,
    open_allows,
    quoted,
    render_chain,
    render_map,
    render_networks,
    render_set,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from ipaddress import IPv4Address, IPv6Address

    from vmsilod.network.plan import Network, Port

LIES = ("mac", "vlan", "ethertype", "storm", "arp", "ip4", "ip6", "nd", "router", "dhcp")
"""Kinds of frames that no honest guest sends: each a set with a counter per TAP, `lie_KIND`."""

PRIORITY = -500
GROUP_RATE, GROUP_BURST = 256, 512
"""Frames to all or to a group that a guest may send in a second, and at once."""

LEASE_TIMEOUT = "14d"

_OVER = f"limit rate over {GROUP_RATE}/second burst {GROUP_BURST} packets"
_TO_GROUP = "ether daddr & 01:00:00:00:00:00 == 01:00:00:00:00:00"

# ND by its bytes, since nft 1.0.6 has no words for them: the target is 8 bytes into the message, the only
# option that may be there follows it (type, length in units of 8, link-layer address).
ND_TARGET, _OPTION, ND_OPTION_MAC = "@th,64,128", "@th,192,16", "@th,208,48"
_SOLICITING_ROUTER_OPTION, _SOLICITING_ROUTER_MAC = "@th,64,16", "@th,80,48"

# BOOTP (RFC 2131): op, yiaddr and chaddr, behind 8 bytes of UDP.
_OP, _YIADDR, _CHADDR = "@th,64,8", "@th,192,32", "@th,288,48"
_ARP_SENDER, _IP_SOURCE = "@nh,112,32", "@nh,96,32"

# What ND messages may claim, asked of the sets own6, nd_own6 and nd_macs; `WHO` is how these begin.
_ND_CHAINS = f"""\
	chain nd_solicit {{
		ip6 nexthdr != ipv6-icmp goto lie_nd
		ip6 saddr :: goto nd_probe
		WHOip6 saddr != @own6 goto lie_nd
		ip6 length 24 accept
		ip6 length 32 {_OPTION} 0x0101 WHO{ND_OPTION_MAC} @nd_macs accept
		goto lie_nd
	}}
	chain nd_probe {{
		WHO{ND_TARGET} != @nd_own6 goto lie_nd
		ip6 length 24 accept
		# A nonce (RFC 7527).
		ip6 length 32 {_OPTION} 0x0e01 accept
		goto lie_nd
	}}
	chain nd_advert {{
		ip6 nexthdr != ipv6-icmp goto lie_nd
		WHOip6 saddr != @own6 goto lie_nd
		WHO{ND_TARGET} != @nd_own6 goto lie_nd
		ip6 length 24 accept
		ip6 length 32 {_OPTION} 0x0201 WHO{ND_OPTION_MAC} @nd_macs accept
		goto lie_nd
	}}
	chain nd_router_solicit {{
		ip6 nexthdr != ipv6-icmp goto lie_nd
		ip6 saddr :: ip6 length 8 accept
		WHOip6 saddr != @own6 goto lie_nd
		ip6 length 8 accept
		ip6 length 16 {_SOLICITING_ROUTER_OPTION} 0x0101 WHO{_SOLICITING_ROUTER_MAC} @nd_macs accept
		goto lie_nd
	}}
"""

_CHAINS = f"""\
	chain frame {{
		iifname . ether saddr != @macs goto lie_mac
		{_TO_GROUP} update @group_rate {{ iifname {_OVER} }} goto lie_storm
		ether type vmap {{ arp : goto check_arp, ip : goto check_ip4, ip6 : goto check_ip6, \
0x8100 : goto lie_vlan, 0x88a8 : goto lie_vlan, 0x9100 : goto lie_vlan }}
		goto lie_ethertype
	}}
	chain check_arp {{
		arp htype != 1 goto lie_arp
		arp ptype != ip goto lie_arp
		arp hlen != 6 goto lie_arp
		arp plen != 4 goto lie_arp
		arp operation != {{ request, reply }} goto lie_arp
		iifname . arp saddr ether != @macs goto lie_arp
		iifname . arp saddr ip @own4 accept
		arp saddr ip 0.0.0.0 arp operation request goto arp_probe
		iifname vmap @arp_subnets
		arp saddr ip @taken4 goto lie_arp
		iifname . {_ARP_SENDER} @leased4 accept
		goto lie_arp
	}}
	# Whether an address is free is asked before it is used: of one's own, or of one that DHCP offered.
	chain arp_probe {{
		iifname . arp daddr ip @own4 accept
		iifname @dhcp arp daddr ip != @taken4 accept
		goto lie_arp
	}}
	chain check_ip4 {{
		icmp type {{ redirect, router-advertisement }} goto lie_router
		udp sport 67 goto lie_dhcp
		iifname . ip saddr @own4 goto ip4_honest
		ip saddr 0.0.0.0 iifname @dhcp ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept
		iifname vmap @ip4_subnets
		# A lease of what is another's, or has become so.
		ip saddr @taken4 goto lie_ip4
		iifname . {_IP_SOURCE} @leased4 goto ip4_honest
		goto lie_ip4
	}}
	# Where a frame of a bridged TAP may go is decided here, by the frame alone: no other hook sees it.
	chain ip4_honest {{
		iifname != @bridged accept
		iifname @dhcp udp sport 68 udp dport 67 ip daddr @closed4 accept
		# The host takes what goes to all of the LAN, with whatever MAC.
		fib daddr type != unicast goto bridged_to_host
		iifname vmap @bridged_open
		{_TO_GROUP} goto denied_quietly
		ip daddr @closed4 goto denied
		ip daddr @taken4 goto denied
		accept
	}}
	chain check_ip6 {{
		ip6 hoplimit 255 exthdr frag exists goto lie_nd
		icmpv6 type vmap {{ nd-router-advert : goto lie_router, nd-redirect : goto lie_router, \
nd-neighbor-solicit : goto nd_solicit, nd-neighbor-advert : goto nd_advert, \
nd-router-solicit : goto nd_router_solicit }}
		udp sport 547 goto lie_dhcp
		iifname . ip6 saddr @own6 goto ip6_honest
		ip6 saddr :: icmpv6 type {{ mld-listener-report, mld2-listener-report }} accept
		goto lie_ip6
	}}
	chain ip6_honest {{
		iifname != @bridged accept
		icmpv6 type {{ mld-listener-report, mld-listener-done, mld2-listener-report }} accept
		fib daddr type {{ local, anycast }} goto bridged_to_host
		ip6 daddr ff00::/8 goto bridged_to_host
		iifname vmap @bridged_open
		{_TO_GROUP} goto denied_quietly
		ip6 daddr @closed6 goto denied
		ip6 daddr @taken6 goto denied
		accept
	}}
	chain bridged_to_host {{
		iifname vmap @bridged_open_host
		{_TO_GROUP} goto denied_quietly
		goto denied
	}}
	# What is counted here may find its set full, which ends its rule: so what is to be done is in the next.
	chain denied_quietly {{
		update @denied {{ iifname }}
		drop
	}}
	chain denied {{
		update @denied {{ iifname }}
		iifname vmap @denied_logs
		drop
	}}
	chain lied {{
		iifname vmap @lied_logs
		drop
	}}
"""


@dataclass(frozen=True)
class Ground:
    """What frames are judged by besides their TAP: only one that is among `devices` can be hooked; `closed`
    is where nobody may go unless it is opened; `host` has addresses that are no VM's.
    """

    devices: frozenset[str]
    closed: Sequence[Network]
    host: Sequence[IPv4Address | IPv6Address]


def render_frame_rules(ports: Sequence[Port], ground: Ground) -> str:
    """The table's content."""
    closed = ground.closed
    bridged = [port for port in ports if port.bridge]
    return "".join(
        (
            _render_identities(ports, ground.host),
            _render_filled(),
            render_networks("closed4", 4, closed),
            render_networks("closed6", 6, closed),
            render_set("bridged", "type ifname", (quoted(port.tap) for port in bridged)),
            render_set("dhcp", "type ifname", (quoted(port.tap) for port in ports if port.dhcp)),
            _render_subnets(ports),
            _render_logs(ports, "lied", "spoofed"),
            _render_logs(bridged, "denied", "denied"),
            _render_opened(bridged),
            "".join(
                render_chain(f"lie_{kind}", (f"update @lie_{kind} {{ iifname }}", "goto lied"))
                for kind in LIES
            ),
            _CHAINS,
            render_nd_chains("iifname . "),
            "".join(_render_hooks(port) for port in ports if port.tap in ground.devices),
        )
    )


def render_nd_chains(who: str) -> str:
    """`nd_solicit`, `nd_advert` and `nd_router_solicit`; a lie goes to `lie_nd`. `who` is "iifname . " where
    a table is of many TAPs.
    """
    return _ND_CHAINS.replace("WHO", who)


def _render_hooks(port: Port) -> str:
    """A chain of its own for each TAP: a device that goes takes its chain along and no other's (before Linux
    6.16), and one chain could have 256 devices at most.
    """
    hook = f"device {quoted(port.tap)} priority {PRIORITY}; policy"
    chains = render_chain(f"in-{port.tap}", (f"type filter hook ingress {hook} drop;", "goto frame"))
    if port.dhcp and port.bridge:
        # What a DHCP server of the LAN told this guest that it may have.
        learn = (
            f"ip saddr @closed4 udp sport 67 udp dport 68 {_OP} 2 {_YIADDR} != @taken_yiaddr "
            f"oifname . {_CHADDR} @nd_macs "
            f"update @leased4 {{ oifname . {_YIADDR} timeout {LEASE_TIMEOUT} }}"
        )
        chains += render_chain(f"out-{port.tap}", (f"type filter hook egress {hook} accept;", learn))
    return chains


def _render_identities(ports: Sequence[Port], host: Sequence[IPv4Address | IPv6Address]) -> str:
    """Who is who, and once more for what nft knows as bytes only."""
    own4 = [(port, own) for port in ports for own in own_addresses(port) if own.version == 4]
    own6 = [(port, own) for port in ports for own in own_addresses(port) if own.version == 6]
    own6 += [(port, derive_link_local(checked_mac(port.mac))) for port in ports]
    macs = [(quoted(port.tap), checked_mac(port.mac)) for port in ports]
    hosts = [*(own.ip for port in ports for own in port.host_addresses), *host]
    taken4 = (*(own for _, own in own4), *(own for own in hosts if own.version == 4))
    # Link-local addresses are no part of it: they are the same on every link.
    taken6 = (
        *(own for _, own in own6 if not own.is_link_local),
        *(own for own in hosts if own.version == 6 and not own.is_link_local),
    )
    return "".join(
        (
            render_set("macs", "type ifname . ether_addr", (f"{tap} . {mac}" for tap, mac in macs)),
            render_set(
                "nd_macs",
                f"typeof iifname . {ND_OPTION_MAC}",
                (f"{tap} . 0x{mac.replace(':', '')}" for tap, mac in macs),
            ),
            render_set(
                "own4", "type ifname . ipv4_addr", (f"{quoted(port.tap)} . {own}" for port, own in own4)
            ),
            render_set(
                "own6", "type ifname . ipv6_addr", (f"{quoted(port.tap)} . {own}" for port, own in own6)
            ),
            render_set(
                "nd_own6",
                f"typeof iifname . {ND_TARGET}",
                (f"{quoted(port.tap)} . 0x{int(own):032x}" for port, own in own6),
            ),
            render_set("taken4", "type ipv4_addr", map(str, taken4)),
            render_set("taken_yiaddr", f"typeof {_YIADDR}", (f"0x{int(taken):08x}" for taken in taken4)),
            render_set("taken6", "type ipv6_addr", map(str, taken6)),
        )
    )


def own_addresses(port: Port) -> tuple[IPv4Address | IPv6Address, ...]:
    return tuple(own.ip for own in port.addresses)


def _render_filled() -> str:
    """The sets that rules write into."""
    size = f"size {SIZE}\n\t\tflags dynamic"
    return "".join(
        (
            render_set("group_rate", "type ifname", (), flags=size),
            *(
                render_set(name, "type ifname", (), flags=f"{size}\n\t\tcounter")
                for name in (*(f"lie_{kind}" for kind in LIES), "denied")
            ),
            render_set(
                "leased4",
                f"typeof oifname . {_YIADDR}",
                (),
                flags=f"size {SIZE}\n\t\tflags dynamic,timeout\n\t\ttimeout {LEASE_TIMEOUT}",
            ),
        )
    )


def _render_subnets(ports: Sequence[Port]) -> str:
    """A guest that asks a DHCP server behind its TAP may have what nobody else has there."""
    texts, ip4, arp = [], {}, {}
    for port in ports:
        subnets = [host.network for host in port.host_addresses if host.version == 4]
        if port.dhcp and subnets:
            tap = checked(port.tap)
            texts += [
                render_chain(
                    f"ip4-{tap}",
                    (f"ip saddr {subnet} ip saddr != @taken4 goto ip4_honest" for subnet in subnets),
                ),
                render_chain(
                    f"arp-{tap}",
                    (f"arp saddr ip {subnet} arp saddr ip != @taken4 accept" for subnet in subnets),
                ),
            ]
            ip4[quoted(tap)] = f"jump ip4-{tap}"
            arp[quoted(tap)] = f"jump arp-{tap}"
    maps = (("ip4_subnets", ip4), ("arp_subnets", arp))
    return "".join((*texts, *(render_map(name, "type ifname : verdict", items) for name, items in maps)))


def _render_logs(ports: Sequence[Port], name: str, word: str) -> str:
    chains, logs = render_logs(ports, word)
    return chains + render_map(f"{name}_logs", "type ifname : verdict", logs)


def render_logs(ports: Sequence[Port], word: str) -> tuple[str, dict[str, str]]:
    """A chain for each port that writes a line to the kernel's log now and then; and the map to them."""
    chains = "".join(
        render_chain(
            f"{word}-{checked(port.tap)}",
            (f'limit rate 6/minute burst 5 packets log prefix "vmsilo: {checked(port.vm)} {word} "',),
        )
        for port in ports
    )
    return chains, {quoted(port.tap): f"jump {word}-{port.tap}" for port in ports}


def _render_opened(ports: Sequence[Port]) -> str:
    texts = []
    for name, prefix, opened in (
        ("bridged_open", "open", open_allows),
        ("bridged_open_host", "host", host_and_group_allows),
    ):
        chains, jumps = render_opened(ports, prefix, {port.tap: allow_rules(opened(port)) for port in ports})
        texts += [chains, render_map(name, "type ifname : verdict", jumps)]
    return "".join(texts)


def render_opened(
    ports: Sequence[Port], prefix: str, rules: Mapping[str, Sequence[str]]
) -> tuple[str, dict[str, str]]:
    """A chain `PREFIX-TAP` for each port with something open; and the map to them."""
    some = [checked(port.tap) for port in ports if rules[port.tap]]
    chains = "".join(render_chain(f"{prefix}-{tap}", rules[tap]) for tap in some)
    return chains, {quoted(tap): f"jump {prefix}-{tap}" for tap in some}
