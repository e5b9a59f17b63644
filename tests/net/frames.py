"""Ethernet frames that a guest could send, and what is read of those that it gets: bytes, made by hand, so
that a lie is as easy as the truth.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

BROADCAST = "ff:ff:ff:ff:ff:ff"
ARP, IPV4, IPV6, VLAN = 0x0806, 0x0800, 0x86DD, 0x8100
UDP, ICMP, ICMP6 = 17, 1, 58


@dataclass(frozen=True)
class Ends:
    """Source and destination, of one layer."""

    source: str
    destination: str


def ethernet(macs: Ends, kind: int, body: bytes, vlan: int | None = None) -> bytes:
    tag = b"" if vlan is None else struct.pack("!HH", VLAN, vlan)
    return pack_mac(macs.destination) + pack_mac(macs.source) + tag + struct.pack("!H", kind) + body


def pack_mac(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def arp(operation: int, sender: tuple[str, str], target: tuple[str, str]) -> bytes:
    """Sender and target as (MAC, address)."""
    ends = b"".join(pack_mac(mac) + IPv4Address(ip).packed for mac, ip in (sender, target))
    return struct.pack("!HHBBH", 1, IPV4, 6, 4, operation) + ends


def ip_udp(ips: Ends, payload: bytes, ports: tuple[int, int] = (4000, 4000)) -> bytes:
    """Of the addresses' version. Without a UDP checksum in IPv4, with one in IPv6."""
    head = struct.pack("!HHHH", *ports, 8 + len(payload), 0)
    if ":" not in ips.source:
        return ipv4(ips, UDP, head + payload)
    total = _checksum(_pseudo6(ips, UDP, len(head) + len(payload)) + head + payload) or 0xFFFF
    return ipv6(ips, UDP, head[:6] + struct.pack("!H", total) + payload)


def ipv4(ips: Ends, protocol: int, body: bytes, ttl: int = 64) -> bytes:
    ends = IPv4Address(ips.source).packed + IPv4Address(ips.destination).packed
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, ttl, protocol, 0) + ends
    return head[:10] + struct.pack("!H", _checksum(head)) + head[12:] + body


def ipv6(ips: Ends, protocol: int, body: bytes) -> bytes:
    ends = IPv6Address(ips.source).packed + IPv6Address(ips.destination).packed
    return struct.pack("!IHBB", 6 << 28, len(body), protocol, 255) + ends + body


def solicitation(mac: str, source: str, target: str) -> bytes:
    """The frame that asks who has `target`, with the sender's MAC as option."""
    wanted = IPv6Address(target).packed
    group = IPv6Address(IPv6Address("ff02::1:ff00:0").packed[:13] + wanted[13:])
    body = struct.pack("!BBHI", 135, 0, 0, 0) + wanted + b"\x01\x01" + pack_mac(mac)
    return _icmp6(Ends(mac, f"33:33:{_show_mac(group.packed[12:])}"), source, group, body)


def advertisement(mac: str, source: str, target: str) -> bytes:
    """A claim to have `target`, to all."""
    body = (
        struct.pack("!BBHI", 136, 0, 0, 0x2000_0000)
        + IPv6Address(target).packed
        + b"\x02\x01"
        + pack_mac(mac)
    )
    return _icmp6(Ends(mac, "33:33:00:00:00:01"), source, IPv6Address("ff02::1"), body)


def router_advertisement(mac: str, source: str) -> bytes:
    body = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
    return _icmp6(Ends(mac, "33:33:00:00:00:01"), source, IPv6Address("ff02::1"), body)


def _icmp6(macs: Ends, source: str, destination: IPv6Address, body: bytes) -> bytes:
    ips = Ends(source, str(destination))
    total = _checksum(_pseudo6(ips, ICMP6, len(body)) + body)
    return ethernet(macs, IPV6, ipv6(ips, ICMP6, body[:2] + struct.pack("!H", total) + body[4:]))


def _pseudo6(ips: Ends, protocol: int, length: int) -> bytes:
    ends = IPv6Address(ips.source).packed + IPv6Address(ips.destination).packed
    return ends + struct.pack("!IxxxB", length, protocol)


def _checksum(data: bytes) -> int:
    words = struct.unpack(f"!{len(data) // 2}H", data) if len(data) % 2 == 0 else _padded(data)
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _padded(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"!{len(data) // 2 + 1}H", data + b"\0")


@dataclass(frozen=True)
class Frame:
    """What came out of a port: the layers as far as a test asks for them."""

    raw: bytes

    @property
    def kind(self) -> int:
        return int.from_bytes(self.raw[12:14], "big")

    @property
    def macs(self) -> Ends:
        return Ends(_show_mac(self.raw[6:12]), _show_mac(self.raw[:6]))

    @property
    def protocol(self) -> int:
        return self.raw[14 + (9 if self.kind == IPV4 else 6)]

    @property
    def payload(self) -> bytes:
        """Of a UDP packet; b"" for anything else."""
        if self.kind not in (IPV4, IPV6) or self.protocol != UDP:
            return b""
        head = 14 + (20 if self.kind == IPV4 else 40)
        length = int.from_bytes(self.raw[head + 4 : head + 6], "big")
        return self.raw[head + 8 : head + length]


def _show_mac(data: bytes) -> str:
    return ":".join(f"{byte:02x}" for byte in data)
