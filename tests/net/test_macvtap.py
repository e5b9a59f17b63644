"""macvtaps on one end of a pair whose other end is the physical network; the test is the guest."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
from dataclasses import replace
from ipaddress import IPv4Address, ip_interface
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from net import packets
from net.packets import Way
from vmsilod.errors import Failed, StartFailed
from vmsilod.network import macvtap
from vmsilod.network.plan import Port
from vmsilod.network.stand_ins import read_name
from vmsilod.network.taps import IFF_VNET_HDR, TUNGETIFF
from vmsilod.network.traffic import find_views

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAC, OTHER, LAN = "02:00:00:00:00:01", "02:00:00:00:00:99", "02:00:00:00:00:50"
PORT = Port("banking", "wan", "banking-0", MAC, link="phys", addresses=(ip_interface("10.5.0.2/24"),))


def install(text: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


def pack(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def ethernet(source: str, kind: int, body: bytes) -> bytes:
    return pack(LAN) + pack(source) + struct.pack("!H", kind) + body + bytes(64)


def udp(source: str, port: int = 4000) -> bytes:
    header = struct.pack("!BBHHHBBH", 0x45, 0, 28, 0, 0, 64, 17, 0)
    addresses = IPv4Address(source).packed + IPv4Address("10.5.0.50").packed
    return header + addresses + struct.pack("!HHHH", port, 4001, 8, 0)


def arp(mac: str, source: str) -> bytes:
    sender = pack(mac) + IPv4Address(source).packed
    return struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2) + sender + pack(LAN) + bytes(4)


class Wire:
    """What comes out on the physical network."""

    def __init__(self) -> None:
        ip("link", "add", "phys", "type", "veth", "peer", "name", "lan", "address", LAN)
        # No other frames than those of the test.
        for name in ("phys", "lan"):
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
            ip("link", "set", name, "up")
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
        self.socket.bind(("lan", 0))
        self.socket.settimeout(0.2)

    def passes(self, fd: int, frame: bytes) -> bool:
        os.write(fd, frame)
        try:
            while True:
                if self.socket.recv(2000)[: len(frame)] == frame:
                    return True
        except TimeoutError:
            return False


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.socket.close()


@pytest.fixture
def opened(wire: Wire) -> Iterator[Callable[[Port], list[int]]]:
    del wire
    fds: list[int] = []

    def acquire(port: Port) -> list[int]:
        got = macvtap.acquire(port, install)
        fds.extend(got)
        return got

    yield acquire
    for fd in fds:
        os.close(fd)


def test_a_guest_and_the_physical_network_reach_each_other(
    wire: Wire, opened: Callable[[Port], list[int]]
) -> None:
    (fd,) = opened(PORT)
    assert read_name(fd) == "banking-0"
    assert wire.passes(fd, ethernet(MAC, 0x0800, udp("10.5.0.2")))
    assert wire.passes(fd, ethernet(MAC, 0x0806, arp(MAC, "10.5.0.2")))
    frame = pack(MAC) + pack(LAN) + struct.pack("!H", 0x88B5) + bytes(50)
    wire.socket.send(frame)
    assert os.read(fd, 2000).endswith(frame)
    (view,) = find_views([PORT], {}, running=True)
    sent = sum(
        map(len, (ethernet(MAC, 0x0800, udp("10.5.0.2")), ethernet(MAC, 0x0806, arp(MAC, "10.5.0.2"))))
    )
    assert (view.received, view.sent, view.dropped) == (len(frame), sent, {})


@pytest.mark.parametrize(
    "frame",
    [
        ethernet(OTHER, 0x0800, udp("10.5.0.2")),
        ethernet(MAC, 0x0800, udp("10.5.0.3")),
        ethernet(MAC, 0x0800, udp("10.5.0.2", port=67)),
        ethernet(MAC, 0x0806, arp(OTHER, "10.5.0.2")),
        ethernet(MAC, 0x0806, arp(MAC, "10.5.0.3")),
        ethernet(MAC, 0x8100, struct.pack("!HH", 5, 0x0800) + udp("10.5.0.2")),
        ethernet(MAC, 0x86DD, bytes.fromhex("6000000000083bff") + bytes(40)),
        ethernet(MAC, 0x88CC, bytes(50)),
    ],
    ids=["mac", "address", "dhcp server", "arp mac", "arp address", "vlan", "no v6", "lldp"],
)
def test_what_a_guest_may_not_send_does_not_come_out(
    wire: Wire, opened: Callable[[Port], list[int]], frame: bytes
) -> None:
    (fd,) = opened(PORT)
    assert not wire.passes(fd, frame)
    (view,) = find_views([PORT], {}, running=True)
    assert (view.state, view.problem, view.dropped) == ("up", "", {"spoofed": 1})
    assert view.sent == 0, "the filter comes before the device counts"


def test_one_that_should_be_there_and_is_not_is_told(wire: Wire) -> None:
    del wire
    (view,) = find_views([PORT], {}, running=False)
    assert (view.state, view.problem) == ("idle", "")
    (view,) = find_views([PORT], {}, running=True)
    assert (view.state, view.problem) == ("broken", "the macvtap 'banking-0' does not exist")


def test_a_guest_that_asks_by_dhcp_may_have_any_address_but_no_other_mac(
    wire: Wire, opened: Callable[[Port], list[int]]
) -> None:
    (fd,) = opened(replace(PORT, dhcp=True))
    assert wire.passes(fd, ethernet(MAC, 0x0800, udp("10.5.0.3")))
    assert not wire.passes(fd, ethernet(OTHER, 0x0800, udp("10.5.0.3")))


V6 = replace(PORT, addresses=(ip_interface("2001:db8::2/64"),))
OWN6, LINK, ROUTER6 = "2001:db8::2", "fe80::ff:fe00:1", "2001:db8::1"
HERE6 = Way(MAC, LAN, OWN6, ROUTER6)
UNSURE = HERE6.of(source="::")


@pytest.mark.parametrize(
    "frame",
    [
        packets.udp(HERE6, 4000, 4001),
        packets.udp(HERE6.of(source=LINK), 4000, 4001),
        packets.solicit(HERE6, ROUTER6),
        packets.solicit(UNSURE, OWN6, b""),
        packets.solicit(UNSURE, LINK, b""),
        packets.advertise(HERE6, OWN6),
        packets.advertise(HERE6.of(source=LINK), LINK),
    ],
    ids=[
        "own",
        "link-local",
        "asks",
        "is it free",
        "is it free, link-local",
        "answers",
        "link-local answers",
    ],
)
def test_v6_addresses_and_their_link_local_one_may_be_used(
    wire: Wire, opened: Callable[[Port], list[int]], frame: bytes
) -> None:
    (fd,) = opened(V6)
    assert wire.passes(fd, frame)


@pytest.mark.parametrize(
    "frame",
    [
        packets.udp(HERE6.of(source="2001:db8::3"), 4000, 4001),
        packets.advertise(HERE6, ROUTER6),
        packets.advertise(HERE6.of(source=ROUTER6), ROUTER6),
        packets.advertise(HERE6, OWN6, packets.nd_option(2, OTHER)),
        packets.solicit(HERE6, ROUTER6, packets.nd_option(1, OTHER)),
        packets.solicit(UNSURE, ROUTER6, b""),
        packets.fragmented(packets.advertise(HERE6, ROUTER6)),
        packets.behind_options(packets.advertise(HERE6, ROUTER6)),
        packets.icmp6(HERE6.of(source=LINK), 134, bytes(12)),
        packets.udp(HERE6, 547, 546),
        ethernet(MAC, 0x0800, udp("10.5.0.2")),
    ],
    ids=[
        *("address", "claim", "claim from it", "claim with another mac", "asks with another mac"),
        *("is another's free", "fragmented claim", "claim behind options", "router", "dhcp server", "no v4"),
    ],
)
def test_what_a_guest_with_v6_may_not_say_does_not_come_out(
    wire: Wire, opened: Callable[[Port], list[int]], frame: bytes
) -> None:
    (fd,) = opened(V6)
    assert not wire.passes(fd, frame)


def test_a_guest_without_v6_addresses_has_no_v6_though_it_asks_by_dhcp(
    wire: Wire, opened: Callable[[Port], list[int]]
) -> None:
    (fd,) = opened(replace(PORT, addresses=(), dhcp=True))
    assert not wire.passes(fd, packets.udp(HERE6, 4000, 4001))
    assert not wire.passes(fd, packets.advertise(HERE6.of(source=LINK), LINK))
    assert wire.passes(fd, ethernet(MAC, 0x0800, udp("10.5.0.3")))


def test_a_vms_macvtaps_go_and_those_of_others_stay(opened: Callable[[Port], list[int]]) -> None:
    opened(PORT)
    opened(replace(PORT, vm="bank", tap="bank-0", mac=OTHER))
    assert macvtap.find_owners() == {"banking", "bank"}
    macvtap.release("bank", "wa")
    assert macvtap.find_owners() == {"banking", "bank"}
    macvtap.release("bank", "wan")
    macvtap.release("bank")
    assert macvtap.find_owners() == {"banking"}
    assert "bank-0" not in ip("-o", "link")
    ip("link", "add", "link", "phys", "name", "mine", "type", "macvtap", "mode", "bridge")
    macvtap.release("banking")
    assert "mine" in ip("-o", "link")


def test_each_queue_is_a_descriptor(opened: Callable[[Port], list[int]]) -> None:
    assert len(opened(replace(PORT, queues=3))) == 3


@pytest.mark.parametrize("offload", [False, True])
def test_only_a_port_with_offload_has_the_virtio_header(
    opened: Callable[[Port], list[int]], *, offload: bool
) -> None:
    (fd,) = opened(replace(PORT, offload=offload))
    answer = bytearray(40)
    fcntl.ioctl(fd, TUNGETIFF, answer)
    assert bool(struct.unpack_from("H", answer, 16)[0] & IFF_VNET_HDR) is offload


def test_one_that_a_killed_daemon_half_made_is_made_anew(opened: Callable[[Port], list[int]]) -> None:
    half = ("name", "banking-0", "group", str(macvtap.GROUP), "type", "macvtap", "mode", "bridge")
    ip("link", "add", "link", "phys", *half)
    opened(PORT)
    assert macvtap.find_owners() == {"banking"}


def test_without_its_filter_there_is_no_macvtap(wire: Wire) -> None:
    del wire

    def refuse(text: str) -> None:
        del text
        raise Failed("nft is not there")

    with pytest.raises(Failed, match="nft is not there"):
        macvtap.acquire(PORT, refuse)
    assert "banking-0" not in ip("-o", "link")


def test_a_link_that_is_not_there_and_a_name_that_is_taken_are_told(
    opened: Callable[[Port], list[int]],
) -> None:
    with pytest.raises(StartFailed, match="no network interface 'gone'"):
        macvtap.acquire(replace(PORT, link="gone"), install)
    opened(PORT)
    with pytest.raises(StartFailed, match="refused"):
        macvtap.acquire(replace(PORT, vm="other", mac=OTHER), install)
    assert macvtap.find_owners() == {"banking"}
