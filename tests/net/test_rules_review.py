"""What a guest cannot do by what is known already: others' connections, leases, routes, broadcasts."""

from __future__ import annotations

import socket
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from net import packets
from net.packets import Way
from net.rules_world import INTERNET, INTERNET6, WAN, WAN6, A, B, E, World, allow
from net.tap_ground import SHORT, heard, ip, received

if TYPE_CHECKING:
    from collections.abc import Iterator

PORT = 7000
BOTH = pytest.mark.parametrize("version", [4, 6])


@pytest.fixture
def world() -> Iterator[World]:
    with World(A, B, E) as made:
        yield made


def pick(version: int, four: str, six: str) -> str:
    return four if version == 4 else six


def error_about(way: Way, quoted: bytes) -> bytes:
    """Port unreachable, about the packet in this frame."""
    if ":" in way.source:
        return packets.icmp6(way, 1, bytes(4) + quoted[14:], hops=64)
    return packets.icmp4(way, 3, bytes(4) + quoted[14:], code=3)


@BOTH
def test_an_error_about_another_vms_connection_reaches_nobody(world: World, version: int) -> None:
    there = world.internet()
    target, wan = pick(version, INTERNET, INTERNET6), pick(version, WAN, WAN6)
    # Whatever is open to alpha: an error about what is not its own is not among it.
    wide = (allow("0.0.0.0/0"), allow("::/0"), allow(wan))
    world.change(replace(A, allow=wide), B, E)
    with there.udp_socket(PORT, target) as server, there.raw_socket() as line:
        world.say(B, target, PORT)
        port = last_source_port(line)
        server.sendto(b"answer", (wan, port))
        assert world.taps["b-0"].receive(b"answer")
        sent = packets.udp(Way(B.mac, A.mac, wan, target), port, PORT, b"stolen")
        answered = packets.udp(Way(B.mac, A.mac, target, wan), PORT, port, b"stolen")
        world.send(A, error_about(world.way(A, wan), sent))
        world.send(A, error_about(world.way(A, target), answered))
        assert not heard(line, b"stolen"), "to the other's peer"
    assert world.taps["b-0"].receive(b"stolen", SHORT) is None, "to the other"
    assert world.kinds("a-0") == {"denied": 2}


def test_an_error_about_the_hosts_connection_reaches_nobody(world: World) -> None:
    there = world.internet()
    with (
        there.udp_socket(PORT, INTERNET),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host,
    ):
        host.connect((INTERNET, PORT))
        host.send(b"mine")
        own = host.getsockname()[1]
        sent = packets.udp(Way(A.mac, A.mac, WAN, INTERNET), own, PORT, b"mine")
        world.send(A, error_about(world.way(A, WAN), sent))
        world.send(E, error_about(world.way(E, WAN, source="10.0.3.7"), sent))
        host.settimeout(SHORT)
        with pytest.raises(TimeoutError):
            host.recv(1)
    assert world.kinds("a-0") == {"denied": 1}
    assert world.kinds("e-0") == {"denied": 1}


def test_an_error_of_a_vm_with_a_lease_about_its_own_connection_passes(world: World) -> None:
    there = world.internet()
    ip(f"neigh replace 10.0.3.7 lladdr {E.mac} dev e-0")
    with there.udp_socket(PORT, INTERNET) as server, there.raw_socket() as line:
        way = world.way(E, INTERNET, source="10.0.3.7")
        world.send(E, packets.udp(way, 4000, PORT))
        assert received(server) is not None
        server.sendto(b"answer", (WAN, last_source_port(line)))
        answer = world.taps["e-0"].receive(b"answer")
        assert answer is not None
        world.send(E, packets.port_unreachable(way, answer))
        assert heard(line, b"\x03\x03"), "the error"
    assert world.kinds("e-0") == {}


def last_source_port(line: socket.socket) -> int:
    """Of the datagram to PORT that came by."""
    while True:
        frame = line.recv(65536)
        at = {b"\x08\x00": 34, b"\x86\xdd": 54}.get(frame[12:14], len(frame))
        if frame[at + 2 : at + 4] == struct.pack("!H", PORT):
            return int(struct.unpack_from("!H", frame, at)[0])
