"""Frames that a hostile guest could send, byte by byte with struct: nothing here refuses to be wrong."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address

ARP, IP4, IP6, VLAN, QINQ = 0x0806, 0x0800, 0x86DD, 0x8100, 0x88A8
ICMP, TCP, UDP, ICMP6, FRAGMENT, HOP_BY_HOP = 1, 6, 17, 58, 44, 0
BROADCAST = "ff:ff:ff:ff:ff:ff"
ALL_NODES = "ff02::1"
SYN, ACK, SYN_ACK = 0x02, 0x10, 0x12


@dataclass(frozen=True)
class Way:
    """From whom to whom, on both layers."""

    mac: str
    to_mac: str
    source: str
    destination: str

    def of(self, **changes: str) -> Way:
        return replace(self, **changes)


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def group_mac(address: str) -> str:
    """Of an IPv6 multicast address (RFC 2464)."""
    return "33:33:" + IPv6Address(address).packed[12:].hex(":")


def ether(mac: str, to_mac: str, kind: int, body: bytes) -> bytes:
    return mac_bytes(to_mac) + mac_bytes(mac) + struct.pack("!H", kind) + body


def tagged(frame: bytes, vlan: int, kind: int = VLAN) -> bytes:
    return frame[:12] + struct.pack("!HH", kind, vlan) + frame[12:]


def checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ip(way: Way, protocol: int, body: bytes, *, hops: int = 64, fragment: int = 0) -> bytes:
    """The frame of an IPv4 or IPv6 packet; `fragment` is the IPv4 header's field of flags and offset."""
    source, destination = ip_address(way.source), ip_address(way.destination)
    if source.version == 6:
        head = struct.pack("!IHBB", 6 << 28, len(body), protocol, hops) + source.packed + destination.packed
        return ether(way.mac, way.to_mac, IP6, head + body)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, fragment, hops, protocol, 0)
    head += source.packed + destination.packed
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return ether(way.mac, way.to_mac, IP4, head + body)


def transport(way: Way, protocol: int, body: bytes, at: int) -> bytes:
    """`body` with its checksum at offset `at`, over the pseudo header."""
    source, destination = ip_address(way.source).packed, ip_address(way.destination).packed
    layout = "!HBBH" if len(source) == 4 else None
    tail = (
        struct.pack("!BBH", 0, protocol, len(body))
        if layout
        else struct.pack("!IHBB", len(body), 0, 0, protocol)
    )
    total = checksum(source + destination + tail + body)
    return body[:at] + struct.pack("!H", total) + body[at + 2 :]


def udp(way: Way, sport: int, dport: int, payload: bytes = b"hello") -> bytes:
    body = struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload
    return ip(way, UDP, transport(way, UDP, body, 6))


def tcp(way: Way, ports: tuple[int, int], flags: int = SYN, numbers: tuple[int, int] = (1, 0)) -> bytes:
    body = struct.pack("!HHIIBBHHH", *ports, *numbers, 5 << 4, flags, 65535, 0, 0)
    return ip(way, TCP, transport(way, TCP, body, 16))


def ping(way: Way, number: int = 1) -> bytes:
    if ip_address(way.source).version == 6:
        return icmp6(way, 128, struct.pack("!HH", 7, number))
    return icmp4(way, 8, struct.pack("!HH", 7, number))


def icmp4(way: Way, kind: int, rest: bytes, *, code: int = 0) -> bytes:
    body = struct.pack("!BBH", kind, code, 0) + rest
    return ip(way, ICMP, body[:2] + struct.pack("!H", checksum(body)) + body[4:])


def port_unreachable(way: Way, frame: bytes) -> bytes:
    """The IPv4 error about a frame that came in."""
    return icmp4(way, 3, bytes(4) + frame[14 : 14 + 28], code=3)


def icmp6(way: Way, kind: int, rest: bytes, *, hops: int = 255) -> bytes:
    body = struct.pack("!BBH", kind, 0, 0) + rest
    return ip(way, ICMP6, transport(way, ICMP6, body, 2), hops=hops)


def fragmented(frame: bytes) -> bytes:
    """An IPv6 frame with a fragment header that says: the first of several."""
    head, body = frame[:54], frame[54:]
    protocol = head[20]
    head = head[:18] + struct.pack("!HB", len(body) + 8, FRAGMENT) + head[21:]
    return head + struct.pack("!BBHI", protocol, 0, 1, 99) + body


def behind_options(frame: bytes) -> bytes:
    """An IPv6 frame with an empty hop-by-hop header before what it carries."""
    head, body = frame[:54], frame[54:]
    protocol = head[20]
    head = head[:18] + struct.pack("!HB", len(body) + 8, HOP_BY_HOP) + head[21:]
    return head + struct.pack("!BB", protocol, 0) + b"\x01\x04\0\0\0\0" + body


def arp(way: Way, *, operation: int = 1, sender: tuple[str, str] = ("", ""), target: str = "") -> bytes:
    """`sender` and `target` are the claim, the way's own where they are empty."""
    mac, address = sender[0] or way.mac, sender[1] or way.source
    body = struct.pack("!HHBBH", 1, IP4, 6, 4, operation) + mac_bytes(mac) + IPv4Address(address).packed
    body += bytes(6) + IPv4Address(target or way.destination).packed
    return ether(way.mac, way.to_mac, ARP, body)


def nd_option(kind: int, mac: str) -> bytes:
    return struct.pack("!BB", kind, 1) + mac_bytes(mac)


def solicit(way: Way, target: str, option: bytes | None = None) -> bytes:
    """A question for `target`, with the sender's own link-layer address unless told otherwise."""
    option = nd_option(1, way.mac) if option is None else option
    return icmp6(way, 135, bytes(4) + IPv6Address(target).packed + option)


def advertise(way: Way, target: str, option: bytes | None = None) -> bytes:
    option = nd_option(2, way.mac) if option is None else option
    return icmp6(way, 136, struct.pack("!I", 0x20000000) + IPv6Address(target).packed + option)


def router_advertisement(way: Way) -> bytes:
    return icmp6(way, 134, struct.pack("!BBHII", 64, 0, 1800, 0, 0) + nd_option(1, way.mac))


def dhcp(way: Way, *, answer: bool, mac: str = "", yours: str = "0.0.0.0") -> bytes:
    """DISCOVER, or what a server says to the client with `mac`."""
    head = (
        struct.pack("!BBBBIHH", 2 if answer else 1, 1, 6, 0, 7, 0, 0) + bytes(4) + IPv4Address(yours).packed
    )
    payload = head + bytes(8) + mac_bytes(mac or way.mac) + bytes(10 + 192) + b"\x63\x82\x53\x63\xff"
    return udp(way, *((67, 68) if answer else (68, 67)), payload)
