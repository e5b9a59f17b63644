"""Frames of the VM alpha: those that lie, with the kind that each is counted as, and those that do not."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from net import packets
from net.packets import ALL_NODES, BROADCAST, SYN, Way, group_mac
from net.rules_world import INTERNET, INTERNET6, OUTSIDE, A, B, link_local

HOST, HOST6 = "10.0.1.254", "fd00:1::fe"
OWN, OWN6 = "10.0.1.1", "fd00:1::1"
OTHER, OTHER6 = "10.0.1.9", "fd00:1::9"
HOST_MAC = "02:00:00:00:ff:0a"
HERE = Way(A.mac, HOST_MAC, OWN, HOST)
HERE6 = Way(A.mac, HOST_MAC, OWN6, HOST6)
LINK = Way(A.mac, group_mac(ALL_NODES), link_local(A), ALL_NODES)
UNSURE = HERE6.of(source="::", destination=ALL_NODES, to_mac=group_mac(ALL_NODES))
TO_ALL = HERE.of(to_mac=BROADCAST)


@dataclass(frozen=True)
class Lie:
    what: str
    kind: str
    frame: bytes


LIED = (
    Lie("another's MAC", "mac", packets.udp(HERE.of(mac=OUTSIDE), 1, 2)),
    Lie("another VM's MAC", "mac", packets.udp(HERE.of(mac=B.mac), 1, 2)),
    Lie("another's MAC, ARP", "mac", packets.arp(TO_ALL.of(mac=OUTSIDE), sender=(A.mac, OWN))),
    Lie("another's MAC, IPv6", "mac", packets.solicit(HERE6.of(mac=OUTSIDE), HOST6)),
    Lie("VLAN tag", "vlan", packets.tagged(packets.udp(HERE, 1, 2), 7)),
    Lie("VLAN tag of priority only", "vlan", packets.tagged(packets.udp(HERE, 1, 2), 0)),
    Lie("VLAN tag of 802.1ad", "vlan", packets.tagged(packets.udp(HERE, 1, 2), 7, packets.QINQ)),
    Lie(
        "two VLAN tags", "vlan", packets.tagged(packets.tagged(packets.udp(HERE, 1, 2), 7), 8, packets.QINQ)
    ),
    Lie("VLAN tag before ARP", "vlan", packets.tagged(packets.arp(TO_ALL), 7)),
    Lie("VLAN tag before IPv6", "vlan", packets.tagged(packets.ping(HERE6), 7)),
    *(
        Lie(f"ethertype {kind:#06x}", "ethertype", packets.ether(A.mac, to_mac, kind, bytes(60)))
        for kind, to_mac in (
            *((0x8035, BROADCAST), (0x8863, BROADCAST), (0x8847, HOST_MAC), (0x88CC, "01:80:c2:00:00:0e")),
            *(
                (0x888E, "01:80:c2:00:00:03"),
                (0x0842, BROADCAST),
                (0x0026, "01:80:c2:00:00:00"),
                (0, HOST_MAC),
            ),
        )
    ),
    Lie("ARP claims another address", "arp", packets.arp(TO_ALL, sender=(A.mac, OTHER))),
    Lie("ARP claims the host's address", "arp", packets.arp(TO_ALL, operation=2, sender=(A.mac, HOST))),
    Lie(
        "ARP claims another VM's address",
        "arp",
        packets.arp(TO_ALL, operation=2, sender=(A.mac, "10.0.2.1")),
    ),
    Lie("ARP names another MAC", "arp", packets.arp(TO_ALL, operation=2, sender=(OUTSIDE, OWN))),
    Lie(
        "ARP asks for another's address as if it were free",
        "arp",
        packets.arp(TO_ALL, sender=(A.mac, "0.0.0.0")),
    ),
    Lie(
        "ARP answers from nowhere",
        "arp",
        packets.arp(TO_ALL, operation=2, sender=(A.mac, "0.0.0.0"), target=OWN),
    ),
    Lie("RARP by ARP's ethertype", "arp", packets.arp(TO_ALL, operation=3)),
    Lie("ARP of another hardware", "arp", packets.arp(TO_ALL)[:15] + b"\x06" + packets.arp(TO_ALL)[16:]),
    Lie("ARP of another protocol", "arp", packets.arp(TO_ALL)[:16] + b"\x86\xdd" + packets.arp(TO_ALL)[18:]),
    Lie(
        "ARP with long hardware addresses",
        "arp",
        packets.arp(TO_ALL)[:18] + b"\x08" + packets.arp(TO_ALL)[19:],
    ),
    Lie("ARP with long addresses", "arp", packets.arp(TO_ALL)[:19] + b"\x10" + packets.arp(TO_ALL)[20:]),
    *(
        Lie(f"IPv4 source {source}", "ip4", packets.udp(HERE.of(source=source), 1, 2))
        for source in (OTHER, HOST, "10.0.2.1", "0.0.0.0", "127.0.0.1", INTERNET, "255.255.255.255")
    ),
    Lie("IPv4 source, TCP", "ip4", packets.tcp(HERE.of(source=OTHER, destination=INTERNET), (1, 2), SYN)),
    Lie("IPv4 source, later fragment", "ip4", packets.ip(HERE.of(source=OTHER), 17, bytes(64), fragment=64)),
    Lie(
        "DHCP without being told to use it",
        "ip4",
        packets.dhcp(
            HERE.of(source="0.0.0.0", destination="255.255.255.255", to_mac=BROADCAST), answer=False
        ),
    ),
    *(
        Lie(f"IPv6 source {source}", "ip6", packets.udp(HERE6.of(source=source), 1, 2))
        for source in (OTHER6, HOST6, "fd00:2::1", "::", "::1", INTERNET6, link_local(B), "::ffff:10.0.1.1")
    ),
    Lie(
        "IPv6 source behind options",
        "ip6",
        packets.behind_options(packets.udp(HERE6.of(source=OTHER6), 1, 2)),
    ),
    Lie("ping from nowhere", "ip6", packets.ping(HERE6.of(source="::"))),
    Lie("ND question from another address", "nd", packets.solicit(HERE6.of(source=OTHER6), HOST6)),
    Lie("ND question with another MAC", "nd", packets.solicit(HERE6, HOST6, packets.nd_option(1, OUTSIDE))),
    Lie(
        "ND question with two options",
        "nd",
        packets.solicit(HERE6, HOST6, packets.nd_option(1, A.mac) + packets.nd_option(1, OUTSIDE)),
    ),
    Lie(
        "ND question with a strange option", "nd", packets.solicit(HERE6, HOST6, packets.nd_option(9, A.mac))
    ),
    Lie("ND probe for another's address", "nd", packets.solicit(UNSURE, OTHER6, b"")),
    Lie("ND probe with a MAC", "nd", packets.solicit(UNSURE, OWN6)),
    Lie("ND claim of another address", "nd", packets.advertise(LINK, OTHER6)),
    Lie("ND claim of the host's address", "nd", packets.advertise(HERE6, HOST6)),
    Lie("ND claim from another address", "nd", packets.advertise(HERE6.of(source=OTHER6), OWN6)),
    Lie("ND claim with another MAC", "nd", packets.advertise(HERE6, OWN6, packets.nd_option(2, OUTSIDE))),
    Lie(
        "ND claim with two options",
        "nd",
        packets.advertise(HERE6, OWN6, packets.nd_option(2, A.mac) + packets.nd_option(2, OUTSIDE)),
    ),
    Lie("ND claim in a fragment", "nd", packets.fragmented(packets.advertise(HERE6, OWN6))),
    Lie("ND claim behind options", "nd", packets.behind_options(packets.advertise(HERE6, OWN6))),
    Lie("ND question behind options", "nd", packets.behind_options(packets.solicit(HERE6, HOST6))),
    Lie(
        "router's question with another MAC",
        "nd",
        packets.icmp6(LINK, 133, bytes(4) + packets.nd_option(1, OUTSIDE)),
    ),
    Lie(
        "router's question from another address", "nd", packets.icmp6(LINK.of(source=OTHER6), 133, bytes(4))
    ),
    Lie(
        "router's question from nowhere with a MAC",
        "nd",
        packets.icmp6(UNSURE, 133, bytes(4) + packets.nd_option(1, A.mac)),
    ),
    Lie(
        "router's question behind options", "nd", packets.behind_options(packets.icmp6(LINK, 133, bytes(4)))
    ),
    *(
        # Bytes behind the packet that look like the option where one would be without the extension header.
        Lie(f"{what} behind options, with a trailer", "nd", packets.behind_options(frame) + option)
        for what, frame, option in (
            ("ND question", packets.solicit(HERE6, HOST6, b""), packets.nd_option(1, A.mac)),
            ("ND claim", packets.advertise(HERE6, OWN6, b""), packets.nd_option(2, A.mac)),
            ("router's question", packets.icmp6(LINK, 133, bytes(4)), packets.nd_option(1, A.mac)),
        )
    ),
    Lie("router advertisement", "router", packets.router_advertisement(LINK)),
    Lie("router advertisement from its own address", "router", packets.router_advertisement(HERE6)),
    Lie("router advertisement in a fragment", "nd", packets.fragmented(packets.router_advertisement(LINK))),
    Lie(
        "router advertisement behind options",
        "router",
        packets.behind_options(packets.router_advertisement(LINK)),
    ),
    Lie("IPv6 redirect", "router", packets.icmp6(LINK, 137, bytes(36))),
    Lie("IPv4 redirect", "router", packets.icmp4(HERE, 5, bytes(32))),
    Lie("IPv4 router advertisement", "router", packets.icmp4(HERE, 9, bytes(12))),
    Lie("DHCP answer", "dhcp", packets.dhcp(HERE, answer=True, yours=OTHER)),
    Lie(
        "DHCP answer to all",
        "dhcp",
        packets.dhcp(TO_ALL.of(destination="255.255.255.255"), answer=True, mac=B.mac, yours=OTHER),
    ),
    Lie("DHCPv6 answer", "dhcp", packets.udp(LINK, 547, 546)),
)


HONEST = {
    "UDP": packets.udp(HERE, 1, 2),
    "UDP over IPv6": packets.udp(HERE6, 1, 2),
    "later fragment": packets.ip(HERE, 17, bytes(64), fragment=64),
    "fragment of IPv6": packets.fragmented(packets.udp(HERE6, 1, 2)),
    "ARP question": packets.arp(TO_ALL),
    "ARP answer": packets.arp(HERE, operation=2),
    "ARP to all about itself": packets.arp(TO_ALL, target=OWN),
    "ARP probe of its own address": packets.arp(TO_ALL, sender=(A.mac, "0.0.0.0"), target=OWN),
    "ND question": packets.solicit(HERE6, HOST6),
    "ND question from its link-local address": packets.solicit(LINK, HOST6),
    "ND question without option": packets.solicit(HERE6, HOST6, b""),
    "ND answer": packets.advertise(HERE6, OWN6),
    "ND answer without option": packets.advertise(HERE6, OWN6, b""),
    "ND answer about its link-local address": packets.advertise(LINK, link_local(A)),
    "ND probe": packets.solicit(UNSURE, OWN6, b""),
    "ND probe of its link-local address": packets.solicit(UNSURE, link_local(A), b""),
    "ND probe with a nonce": packets.solicit(UNSURE, OWN6, b"\x0e\x01abcdef"),
    "router's question": packets.icmp6(LINK, 133, bytes(4)),
    "router's question with its MAC": packets.icmp6(LINK, 133, bytes(4) + packets.nd_option(1, A.mac)),
    "router's question from nowhere": packets.icmp6(UNSURE, 133, bytes(4)),
    "group report from nowhere": packets.behind_options(packets.icmp6(UNSURE, 143, bytes(4), hops=1)),
    "packet of 60000 bytes": packets.ip(HERE, 17, struct.pack("!HHHH", 1, 2, 59980, 0) + bytes(59972)),
}
