"""What `allow` and `nameservers` open, and that they open nothing else."""

from __future__ import annotations

import socket
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from net import packets
from net.rules_world import LAN, LAN6, A, B, E, World, allow
from net.tap_ground import SHORT, heard, received

if TYPE_CHECKING:
    from collections.abc import Iterator

    from net.tap_ground import Peer
    from vmsilod.network.plan import Allow

PORT = 7000
BOTH = pytest.mark.parametrize("version", [4, 6])


@pytest.fixture
def world() -> Iterator[World]:
    with World(A, B, E) as made:
        yield made


def pick(version: int, four: str, six: str) -> str:
    return four if version == 4 else six


ENTRIES: dict[str, tuple[Allow, set[str]]] = {
    "any": (allow(f"{LAN}/32"), {"udp 80", "udp 81", "tcp 80", "tcp 81", "ping"}),
    "network": (allow("192.168.1.0/24"), {"udp 80", "udp 81", "tcp 80", "tcp 81", "ping"}),
    "protocol": (allow(f"{LAN}/32", "tcp"), {"tcp 80", "tcp 81"}),
    "port": (allow(f"{LAN}/32", "tcp", (80, 80)), {"tcp 80"}),
    "ports": (allow("192.168.0.0/16", "udp", (79, 80)), {"udp 80"}),
    "icmp": (allow(f"{LAN}/32", "icmp"), {"ping"}),
    "another address": (allow("192.168.1.8/32"), set()),
}


@pytest.mark.parametrize(("entry", "reached"), ENTRIES.values(), ids=ENTRIES)
def test_an_entry_opens_what_it_says(world: World, entry: Allow, reached: set[str]) -> None:
    lan = world.lan()
    world.change(replace(A, allow=(entry,)), B, E)
    assert reached_on(world, lan) == reached
    assert world.count("a-0", "denied") == 5 - len(reached)


def reached_on(world: World, lan: Peer) -> set[str]:
    """What of five packets to the LAN arrives there."""
    way = world.way(A, LAN)
    sent = {
        **{f"udp {port}": packets.udp(way, 4000, port) for port in (80, 81)},
        **{f"tcp {port}": packets.tcp(way, (4000, port)) for port in (80, 81)},
        "ping": packets.ping(way),
    }
    found = set()
    with lan.raw_socket() as line:
        for what, frame in sent.items():
            world.send(A, frame)
            # Addresses, and ports or type: what a router changes is left out.
            if heard(line, frame[26:34] + frame[34 : 35 if what == "ping" else 38]):
                found.add(what)
    return found


def test_an_entry_of_ipv6_opens_what_it_says(world: World) -> None:
    lan = world.lan()
    entries = (allow("fd07::/64", "udp", (PORT, PORT)), allow("fd07::/64", "icmp"))
    world.change(replace(A, allow=entries), B, E)
    with lan.udp_socket(PORT, "::") as one, lan.udp_socket(PORT + 1, "::") as two:
        world.say(A, LAN6, PORT + 1)
        world.say(A, LAN6, PORT)
        assert received(one) is not None
        assert received(two, SHORT) is None
    world.send(A, packets.ping(world.way(A, LAN6)))
    assert world.taps["a-0"].receive(b"\x81\0"), "echo reply"


@BOTH
def test_dns_goes_to_the_configured_nameservers(world: World, version: int) -> None:
    lan = world.lan()
    target = pick(version, LAN, LAN6)
    world.change(replace(A, nameservers=(target,)), B, E)
    with (
        lan.udp_socket(53, pick(version, "0.0.0.0", "::")) as server,
        lan.udp_socket(54, pick(version, "0.0.0.0", "::")) as other,
    ):
        world.say(A, target, 53)
        assert received(server) is not None
        world.say(A, target, 54)
        assert received(other, SHORT) is None
        world.say(B, target, 53)
        assert received(server, SHORT) is None
    with lan.raw_socket() as line:
        world.send(A, packets.tcp(world.way(A, target), (4000, 53)))
        assert heard(line, struct.pack("!HH", 4000, 53))


@BOTH
def test_dns_goes_to_the_host_where_it_is_the_nameserver(world: World, version: int) -> None:
    target = pick(version, "10.0.1.254", "fd00:1::fe")
    world.change(replace(A, nameservers=(target,)), B, E)
    with socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as server:
        server.bind(("", 53))
        world.say(A, target, 53)
        assert received(server) is not None
        world.say(A, pick(version, "10.0.2.254", "fd00:2::fe"), 53)
        world.say(B, target, 53)
        assert received(server, SHORT) is None


def test_a_guests_error_about_an_answer_reaches_who_answered(world: World) -> None:
    lan = world.lan()
    world.change(replace(A, allow=(allow(LAN, "udp", (PORT, PORT)),)), B, E)
    way = world.way(A, LAN)
    with lan.udp_socket(PORT, LAN) as server, lan.raw_socket() as line:
        world.say(A, LAN, PORT)
        got = received(server)
        assert got is not None
        server.sendto(b"answer", (got[1], 4000))
        answer = world.taps["a-0"].receive(b"answer")
        assert answer is not None
        world.send(A, packets.port_unreachable(way, answer))
        assert heard(line, b"\x03\x03"), "the error"
        strange = packets.udp(way.of(source=LAN, destination="10.0.1.1"), PORT + 1, 4000)
        world.send(A, packets.port_unreachable(way, strange))
        assert world.kinds("a-0") == {"denied": 1}, "one about nothing is not known"
