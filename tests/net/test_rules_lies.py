"""What a guest says of itself: each lie is dropped before anything of the host sees it, and counted."""

from __future__ import annotations

import socket
from dataclasses import replace
from ipaddress import ip_interface
from typing import TYPE_CHECKING

import pytest
from net import packets
from net.lies import HERE, HERE6, HONEST, HOST6, HOST_MAC, LIED, LINK, OWN6, TO_ALL, Lie
from net.packets import BROADCAST, Way
from net.rules_world import INTERNET, OUTSIDE, A, B, C, E, World
from net.tap_ground import ip
from vmsilod.network.frame_rules import GROUP_BURST, LIES

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def world() -> Iterator[World]:
    with World(A, B) as made:
        for tap, port in (("a-0", A), ("b-0", B)):
            ip(f"link set {tap} address 02:00:00:00:ff:{port.mac[-2:]}")
        yield made


@pytest.mark.parametrize("lie", LIED, ids=lambda lie: lie.what.replace(" ", "-"))
def test_a_lie_is_dropped_and_counted(world: World, lie: Lie) -> None:
    before, passed = world.kinds("a-0"), world.passed("a-0")
    world.send(A, lie.frame)
    assert world.passed("a-0") == passed
    after = world.kinds("a-0")
    assert {kind: count - before.get(kind, 0) for kind, count in after.items()} | {
        lie.kind: 0
    } == dict.fromkeys(after, 0)
    assert after[lie.kind] == before.get(lie.kind, 0) + 1


def test_every_kind_of_lie_is_told_here() -> None:
    assert {lie.kind for lie in LIED} | {"storm"} == set(LIES)


@pytest.mark.parametrize("what", HONEST)
def test_an_honest_frame_passes(world: World, what: str) -> None:
    passed = world.passed("a-0")
    world.send(A, HONEST[what])
    assert world.passed("a-0") == passed + 1
    assert not set(world.kinds("a-0")) & set(LIES)


def test_a_frame_too_short_for_its_header_is_dropped(world: World) -> None:
    for kind in (packets.ARP, packets.IP4, packets.IP6):
        world.send(A, packets.ether(A.mac, HOST_MAC, kind, b"\x45\0"))
    assert world.passed("a-0") == 0


def test_each_vm_is_itself(world: World) -> None:
    """What one may say the other may not: no rule is about all of them."""
    world.send(
        B, packets.udp(HERE, 1, 2), packets.udp(HERE.of(mac=B.mac), 1, 2), packets.arp(TO_ALL.of(mac=B.mac))
    )
    world.send(
        B,
        packets.udp(HERE6.of(mac=B.mac), 1, 2),
        packets.advertise(HERE6.of(mac=B.mac, source="fd00:2::1"), OWN6),
    )
    assert world.passed("b-0") == 0
    assert world.kinds("b-0") == {"mac": 1, "ip4": 1, "arp": 1, "ip6": 1, "nd": 1}
    assert world.kinds("a-0") == {}


@pytest.mark.parametrize(
    "frame", [packets.arp(TO_ALL), packets.solicit(LINK, HOST6)], ids=["broadcast", "multicast"]
)
def test_a_storm_is_dropped_and_counted(world: World, frame: bytes) -> None:
    number = 4 * GROUP_BURST
    world.send(A, *[frame] * number)
    # What the second that it took adds, on a slow machine.
    assert GROUP_BURST <= world.passed("a-0") < number
    assert world.count("a-0", "storm") == number - world.passed("a-0")
    passed = world.passed("a-0")
    world.send(A, *[packets.udp(HERE, 1, 2)] * number)
    assert world.passed("a-0") == passed + number, "what is for one machine is no storm"
    world.send(B, packets.arp(TO_ALL.of(mac=B.mac, source="10.0.2.1")))
    assert world.passed("b-0") == 1, "one VM's storm is not another's"


def test_dhcp_may_be_asked_where_it_is_configured() -> None:
    ask = Way(E.mac, BROADCAST, "0.0.0.0", "255.255.255.255")
    with World(A, E) as world:
        world.send(E, packets.dhcp(ask, answer=False))
        assert world.passed("e-0") == 1
        world.send(
            E,
            packets.udp(ask, 68, 69),
            packets.udp(ask, 69, 67),
            packets.udp(ask.of(destination=INTERNET), 68, 67),
        )
        world.send(E, packets.dhcp(ask.of(source="10.0.3.7"), answer=True))
        assert world.passed("e-0") == 1
        assert world.kinds("e-0")["ip4"] == 3
        assert world.kinds("e-0")["dhcp"] == 1


def test_what_dhcp_gives_is_in_the_subnet_and_nobody_elses() -> None:
    neighbour = replace(A, addresses=(ip_interface("10.0.3.1/24"),))
    with World(neighbour, E) as world:
        way = Way(E.mac, BROADCAST, "10.0.3.7", "10.0.3.254")
        world.send(
            E,
            packets.udp(way, 1, 2),
            packets.arp(way),
            packets.arp(way, sender=(E.mac, "0.0.0.0"), target="10.0.3.7"),
        )
        assert world.passed("e-0") == 3
        for address in ("10.0.3.254", "10.0.3.1", "10.0.1.254", "10.0.4.7"):
            lie = way.of(source=address)
            world.send(E, packets.udp(lie, 1, 2), packets.arp(lie))
        world.send(E, packets.arp(way, sender=(E.mac, "0.0.0.0"), target="10.0.3.1"))
        assert world.passed("e-0") == 3
        assert world.kinds("e-0") == {"denied": 1, "ip4": 4, "arp": 5}


def test_a_bridged_vm_has_what_the_dhcp_server_told_it() -> None:
    learner = replace(C, dhcp=True, addresses=())
    ip("link add br0 type bridge")
    ip("link set br0 up")
    with World(learner) as world:
        way = Way(C.mac, OUTSIDE, "192.168.5.40", INTERNET)
        world.send(
            learner, packets.udp(way, 1, 2), packets.arp(way.of(to_mac=BROADCAST, destination="192.168.5.1"))
        )
        assert world.passed("c-0") == 0
        server = Way(OUTSIDE, BROADCAST, "192.168.5.1", "255.255.255.255")
        answer_from_lan(packets.dhcp(server, answer=True, mac=OUTSIDE, yours="192.168.5.41"))
        answer_from_lan(packets.dhcp(server, answer=True, mac=C.mac, yours="192.168.5.40"))
        world.send(
            learner, packets.udp(way, 1, 2), packets.arp(way.of(to_mac=BROADCAST, destination="192.168.5.1"))
        )
        assert world.passed("c-0") == 2
        world.send(learner, packets.udp(way.of(source="192.168.5.41"), 1, 2))
        assert world.passed("c-0") == 2, "that was another client's"
        world.install()
        world.send(learner, packets.udp(way, 1, 2))
        assert world.passed("c-0") == 3, "new rules know it too"


def answer_from_lan(frame: bytes) -> None:
    """A frame that the bridge sends to all of its ports."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as host:
        host.bind(("br0", 0))
        host.send(frame)
