"""A VM in a bridge of the host: each frame alone decides where it may go, since no router stands between."""

from __future__ import annotations

import socket
from dataclasses import replace
from ipaddress import ip_interface
from typing import TYPE_CHECKING

import pytest
from net import packets
from net.packets import BROADCAST, Way, group_mac
from net.rules_world import INTERNET, INTERNET6, OUTSIDE, A, C, D, World, allow, link_local
from net.tap_ground import SHORT, Tap, ip, mac_of, peer, received

if TYPE_CHECKING:
    from collections.abc import Iterator

    from net.tap_ground import Peer

NEIGHBOUR, NEIGHBOUR6, HOST, HOST6 = "192.168.5.1", "2001:db8:5::1", "192.168.5.2", "2001:db8:5::2"
PORT = 7000


@pytest.fixture
def world() -> Iterator[World]:
    ip("link add br0 type bridge")
    ip(f"addr add {HOST}/24 dev br0")
    ip(f"addr add {HOST6}/64 dev br0 nodad")
    ip("link set br0 up")
    with World(A, C, D) as made:
        for tap in ("c-0", "d-0"):
            ip(f"link set {tap} type bridge_slave isolated on")
        yield made


@pytest.fixture
def neighbour(world: World) -> Iterator[Peer]:
    """A machine of the same LAN."""
    with peer("port", f"{NEIGHBOUR}/24", f"{NEIGHBOUR6}/64") as made:
        ip("link set port master br0")
        world.install()
        yield made


def way(neighbour: Peer, destination: str) -> Way:
    source = "fd05::12" if ":" in destination else "192.168.5.12"
    return Way(C.mac, neighbour.mac(), source, destination)


@pytest.mark.parametrize("target", [INTERNET, INTERNET6])
def test_the_internet_is_open_by_way_of_the_lans_router(world: World, neighbour: Peer, target: str) -> None:
    version = 6 if ":" in target else 4
    neighbour.ip(f"addr add {target} dev lo{' nodad' if version == 6 else ''}")
    with neighbour.udp_socket(PORT, target) as server:
        world.send(C, packets.udp(way(neighbour, target), 4000, PORT))
        got = received(server)
        assert got is not None
        assert got[1] == way(neighbour, target).source, "as itself"
    assert world.kinds("c-0") == {}


@pytest.mark.parametrize(
    "target", [NEIGHBOUR, NEIGHBOUR6, "192.168.5.255", "10.1.1.1", "fd05::7", "192.168.5.13"]
)
def test_the_lan_is_closed_until_it_is_opened(world: World, neighbour: Peer, target: str) -> None:
    passed = world.passed("c-0")
    world.send(C, packets.udp(way(neighbour, target), 4000, PORT))
    assert world.passed("c-0") == passed
    assert world.kinds("c-0") == {"denied": 1}
    world.change(A, replace(C, allow=(allow(target, "udp", (PORT, PORT)),)), D)
    world.send(C, packets.udp(way(neighbour, target), 4000, PORT))
    assert world.passed("c-0") == passed + 1
    world.send(C, packets.udp(way(neighbour, target), 4000, PORT + 1))
    assert world.passed("c-0") == passed + 1
    assert world.kinds("c-0") == {"denied": 2}


def test_another_bridged_vm_is_closed_whatever_its_address(world: World) -> None:
    target = Way(C.mac, D.mac, "fd05::12", "2001:db8:5::13")
    world.send(C, packets.udp(target, 4000, PORT))
    assert world.taps["d-0"].receive(packets.mac_bytes(C.mac), SHORT) is None
    assert world.kinds("c-0") == {"denied": 1}


def test_the_address_of_a_vm_elsewhere_is_closed_whatever_it_is() -> None:
    elsewhere = replace(D, addresses=(ip_interface("2001:db8:77::13/64"), ip_interface("203.0.113.77/24")))
    ip("link add br0 type bridge")
    with World(C, elsewhere) as world:
        for source, target in (("fd05::12", "2001:db8:77::13"), ("192.168.5.12", "203.0.113.77")):
            world.send(C, packets.udp(Way(C.mac, D.mac, source, target), 4000, PORT))
        assert world.passed("c-0") == 0
        assert world.kinds("c-0") == {"denied": 2}


@pytest.mark.parametrize("target", [HOST, HOST6])
def test_the_host_is_closed_also_on_its_bridge(world: World, target: str) -> None:
    frame = packets.udp(Way(C.mac, mac_of("br0"), way_source(target), target), 4000, PORT)
    with socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("", PORT))
        network = "2001:db8:5::/64" if ":" in target else "192.168.5.0/24"
        for opened in ((), (allow(network), allow("::/0"), allow("0.0.0.0/0"))):
            world.change(A, replace(C, allow=opened), D)
            world.send(C, frame)
            assert received(server, SHORT) is None
        assert world.kinds("c-0") == {"denied": 2}
        world.change(A, replace(C, allow=(allow(target),)), D)
        world.send(C, frame)
        assert received(server) is not None


def way_source(target: str) -> str:
    return "fd05::12" if ":" in target else "192.168.5.12"


def test_groups_are_closed_until_they_are_opened(world: World, neighbour: Peer) -> None:
    mdns = Way(C.mac, "01:00:5e:00:00:fb", "192.168.5.12", "224.0.0.251")
    mdns6 = Way(C.mac, group_mac("ff02::fb"), "fd05::12", "ff02::fb")
    # To every machine of the LAN, with an address that is none of it.
    disguised = Way(C.mac, BROADCAST, "192.168.5.12", INTERNET)
    disguised6 = Way(C.mac, group_mac("ff02::1"), "fd05::12", INTERNET6)
    frames = [packets.udp(each, 5353, 5353) for each in (mdns, mdns6, disguised, disguised6)]
    world.send(C, *frames)
    assert world.passed("c-0") == 0
    assert world.kinds("c-0") == {"denied": 4}
    world.change(A, replace(C, allow=(allow("224.0.0.251"), allow("ff02::fb"))), D)
    world.send(C, *frames)
    assert world.passed("c-0") == 2
    assert neighbour.mac()


def test_what_a_machine_needs_in_a_lan_passes(world: World, neighbour: Peer) -> None:
    tap: Tap = world.taps["c-0"]
    world.send(C, packets.arp(Way(C.mac, BROADCAST, "192.168.5.12", NEIGHBOUR)))
    assert tap.receive(packets.mac_bytes(C.mac) + packets.mac_bytes(neighbour.mac())), "ARP answer"
    group = "ff02::1:ff00:1"
    ask = Way(C.mac, group_mac(group), link_local(C), group)
    world.send(C, packets.solicit(ask, NEIGHBOUR6))
    assert tap.receive(b"\x88\0"), "neighbour advertisement"
    report = ask.of(destination="ff02::16", to_mac=group_mac("ff02::16"))
    world.send(C, packets.behind_options(packets.icmp6(report, 143, bytes(4), hops=1)))
    assert world.kinds("c-0") == {}


def test_dhcp_passes_where_it_is_configured(world: World) -> None:
    ask = Way(C.mac, BROADCAST, "0.0.0.0", "255.255.255.255")
    renew = Way(C.mac, OUTSIDE, "192.168.5.12", NEIGHBOUR)
    world.send(C, packets.dhcp(ask, answer=False), packets.dhcp(renew, answer=False))
    assert world.passed("c-0") == 0
    world.change(A, replace(C, dhcp=True), D)
    world.send(C, packets.dhcp(ask, answer=False), packets.dhcp(renew, answer=False))
    assert world.passed("c-0") == 2


@pytest.mark.parametrize("target", [NEIGHBOUR, NEIGHBOUR6])
def test_dns_goes_to_the_configured_nameservers(world: World, neighbour: Peer, target: str) -> None:
    world.change(A, replace(C, nameservers=(target,)), D)
    there = way(neighbour, target)
    for frame in (packets.udp(there, 4000, 53), packets.tcp(there, (4000, 53))):
        world.send(C, frame)
    assert world.passed("c-0") == 2
    world.send(C, packets.udp(way(neighbour, target), 4000, 54))
    assert world.passed("c-0") == 2


def test_a_bridged_vms_address_comes_from_its_bridge_only(world: World, neighbour: Peer) -> None:
    """Opened to the host, it is heard there; by another interface its address is not."""
    world.change(A, replace(C, allow=(allow(HOST),)), D)
    with (
        peer("other", "192.168.9.1/24") as other,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
    ):
        ip("addr add 192.168.9.2/24 dev other")
        server.bind(("", PORT))
        with other.raw_socket() as line:
            line.send(packets.udp(Way(other.mac(), mac_of("other"), "192.168.5.12", HOST), 1, PORT, b"lie"))
        assert received(server, SHORT) is None
        assert world.kinds("other") == {"elsewhere": 1}
        world.send(C, packets.udp(Way(C.mac, mac_of("br0"), "192.168.5.12", HOST), 1, PORT, b"truth"))
        got = received(server)
        assert got is not None
        assert got[0] == b"truth"
    assert neighbour.mac()
