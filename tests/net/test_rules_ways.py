"""Where a routed VM's packets go, and who reaches it: closed by default, alike for IPv4 and IPv6."""

from __future__ import annotations

import socket
import struct
from dataclasses import replace
from ipaddress import ip_interface
from typing import TYPE_CHECKING

import pytest
from net import packets
from net.packets import ACK, ALL_NODES, SYN, SYN_ACK, Way, group_mac
from net.rules_world import (
    HOST_ON_LAN,
    INTERNET,
    INTERNET6,
    LAN,
    LAN6,
    LAN_GLOBAL6,
    WAN,
    WAN6,
    A,
    B,
    E,
    World,
    allow,
    link_local,
)
from net.tap_ground import SHORT, WAIT, heard, ip, mac_of, peer, received, set_sysctl
from vmsilod.network import installed

if TYPE_CHECKING:
    from collections.abc import Iterator


PORT = 7000

BOTH = pytest.mark.parametrize("version", [4, 6])


@pytest.fixture
def world() -> Iterator[World]:
    with World(A, B, E) as made:
        yield made


HOSTS = {4: ("10.0.1.254", "10.0.2.254", HOST_ON_LAN), 6: ("fd00:1::fe", "fd00:2::fe", "fd07::2")}
"""The host's address for alpha, that for beta, that in the LAN."""


def pick(version: int, four: str, six: str) -> str:
    return four if version == 4 else six


def test_the_internet_answers_and_sees_the_host_only(world: World) -> None:
    there = world.internet()
    for version in (4, 6):
        with there.udp_socket(PORT, pick(version, INTERNET, INTERNET6)) as server:
            world.say(A, pick(version, INTERNET, INTERNET6), PORT)
            data, sender = server.recvfrom(100)
            assert (data, sender[0]) == (b"hello", pick(version, WAN, WAN6)), "masqueraded"
            server.sendto(b"answer", sender)
            assert world.taps["a-0"].receive(b"answer"), "a reply passes"
    assert world.kinds("a-0") == {}


def test_a_global_address_of_ipv6_is_not_translated() -> None:
    port = replace(
        A,
        host_addresses=(ip_interface("2001:db8:a::fe/64"),),
        addresses=(ip_interface("2001:db8:a::1/64"),),
    )
    with World(port) as world, world.internet().udp_socket(PORT, "::") as server:
        world.say(port, INTERNET6, PORT)
        assert received(server) == (b"hello", "2001:db8:a::1")


def test_tcp_there_and_back(world: World) -> None:
    there = world.internet()
    with there.listener(PORT, INTERNET) as server:
        way = world.way(A, INTERNET)
        world.send(A, packets.tcp(way, (4000, PORT), SYN))
        answer = world.taps["a-0"].receive(struct.pack("!HH", PORT, 4000))
        assert answer is not None
        number = struct.unpack("!I", answer[38:42])[0]
        world.send(A, packets.tcp(way, (4000, PORT), ACK, (2, number + 1)))
        connection, caller = server.accept()
        connection.close()
    assert caller[0] == WAN


def test_an_icmp_error_about_a_vms_packet_reaches_it(world: World) -> None:
    world.internet()
    for target in (INTERNET, INTERNET6):
        world.say(A, target, 9)  # nobody listens there
        assert world.taps["a-0"].receive(b"hello"), "the error quotes the packet"


def test_no_internet_without_nat() -> None:
    with World(A, nat="") as world:
        there = world.internet()
        for version in (4, 6):
            with there.udp_socket(PORT, pick(version, "0.0.0.0", "::")) as server:
                world.say(A, pick(version, INTERNET, INTERNET6), PORT)
                assert received(server, SHORT) is None
        assert world.kinds("a-0") == {"denied": 2}


def test_no_internet_by_another_interface(world: World) -> None:
    """Only the NAT interface leads there, whatever the routes say."""
    with peer("vpn", "198.51.101.1/24", "2001:db8:2::1/64") as other:
        ip("addr add 198.51.101.2/24 dev vpn")
        ip("addr add 2001:db8:2::2/64 dev vpn nodad")
        ip("route add 203.0.113.0/24 via 198.51.101.1")
        ip("route add 2001:db8:9::/64 via 2001:db8:2::1")
        other.ip(f"addr add {INTERNET}/32 dev lo")
        other.ip(f"addr add {INTERNET6}/128 dev lo nodad")
        for version in (4, 6):
            with other.udp_socket(PORT, pick(version, "0.0.0.0", "::")) as server:
                world.say(A, pick(version, INTERNET, INTERNET6), PORT)
                assert received(server, SHORT) is None
    assert world.kinds("a-0") == {"denied": 2}


@pytest.mark.parametrize("target", [LAN, LAN6, LAN_GLOBAL6])
def test_the_lan_is_closed_until_it_is_opened(world: World, target: str) -> None:
    lan = world.lan()
    with lan.udp_socket(PORT, target) as server:
        world.say(A, target, PORT)
        assert received(server, SHORT) is None
        assert world.kinds("a-0") == {"denied": 1}
        world.change(replace(A, allow=(allow(target),)), B, E)
        world.say(A, target, PORT)
        assert received(server) is not None
        assert world.kinds("a-0") == {"denied": 1}, "counters outlive a change"
        world.change(A, B, E)
        world.say(A, target, PORT)
        assert received(server, SHORT) is None, "closed at once, also for what was begun"
        world.say(B, target, PORT)
        assert received(server, SHORT) is None


def test_a_lan_behind_the_nat_interface_is_closed_too(world: World) -> None:
    """The router's own addresses are global ones; it is a neighbour all the same."""
    there = world.internet()
    for target in ("198.51.100.1", "2001:db8:1::1"):
        with there.udp_socket(PORT, target) as server:
            world.say(A, target, PORT)
            assert received(server, SHORT) is None
    assert world.kinds("a-0") == {"denied": 2}


CLOSED = (
    *("10.9.9.9", "172.16.0.1", "172.31.255.254", "192.168.77.1", "100.64.0.1", "169.254.169.254"),
    *("198.18.0.1", "192.0.0.9", "240.0.0.1", "255.255.255.254", "fd77::1", "fec0::1", "64:ff9b::a00:1"),
    *("2002:a00:1::1", "4000::1", "::a00:1"),
)


@pytest.mark.parametrize("target", CLOSED)
def test_what_is_no_internet_is_closed_even_where_a_route_leads_there(world: World, target: str) -> None:
    there = world.internet()
    with there.raw_socket() as line:
        world.say(A, target, PORT)
        world.say(A, INTERNET6 if ":" in target else INTERNET, PORT + 1)
        # To where, and how long: NAT changes the source's port.
        wanted = (struct.pack("!HH", PORT, 13), struct.pack("!HH", PORT + 1, 13))
        while not any(ports in (frame := line.recv(65536)) for ports in wanted):
            pass
    assert wanted[1] in frame


@BOTH
def test_one_vm_does_not_reach_another(world: World, version: int) -> None:
    target = pick(version, "10.0.2.1", "fd00:2::1")
    world.say(A, target, PORT)
    world.send(A, packets.ping(world.way(A, target)))
    world.send(A, packets.tcp(world.way(A, target), (1, PORT)))
    assert world.taps["b-0"].receive(packets.mac_bytes(B.mac), SHORT) is None
    assert world.kinds("a-0") == {"denied": 3}
    world.change(replace(A, allow=(allow(target),)), B, E)
    world.say(A, target, PORT)
    assert world.taps["b-0"].receive(b"hello") is not None
    way = world.way(B, pick(version, "10.0.1.1", "fd00:1::1"))
    world.send(B, packets.udp(way, PORT, 4000, b"answer"))
    assert world.taps["a-0"].receive(b"answer") is not None, "a reply passes"
    world.send(B, packets.udp(way, PORT, 4001, b"mine"))
    assert world.taps["a-0"].receive(b"mine", SHORT) is None, "what it begins itself does not"


@BOTH
def test_the_host_is_closed(world: World, version: int) -> None:
    world.lan()
    kind = socket.AF_INET if version == 4 else socket.AF_INET6
    with socket.socket(kind, socket.SOCK_DGRAM) as server:
        server.bind(("", PORT))
        targets = HOSTS[version]
        # A network that is open does not open the host in it.
        network = pick(version, "192.168.1.0/24", "fd07::/64")
        world.change(replace(A, allow=(allow(network), allow(pick(version, "0.0.0.0/0", "::/0")))), B, E)
        for target in targets:
            world.say(A, target, PORT)
            world.send(A, packets.ping(world.way(A, target)))
            world.send(A, packets.tcp(world.way(A, target), (1, 22)))
        assert received(server, SHORT) is None
        assert world.taps["a-0"].receive(packets.mac_bytes(A.mac), SHORT) is None, "no answer of any kind"
        assert world.kinds("a-0") == {"denied": 9}
        world.change(replace(A, allow=(allow(targets[0], "udp", (PORT, PORT)),)), B, E)
        world.say(A, targets[0], PORT)
        assert received(server) is not None
        world.say(A, targets[0], PORT + 1)
        assert world.kinds("a-0") == {"denied": 10}


@BOTH
def test_the_host_reaches_its_vms(world: World, version: int) -> None:
    kind = socket.AF_INET if version == 4 else socket.AF_INET6
    target = pick(version, "10.0.1.1", "fd00:1::1")
    with socket.socket(kind, socket.SOCK_DGRAM) as host:
        host.sendto(b"question", (target, PORT))
        assert world.taps["a-0"].receive(b"question")
        own = host.getsockname()[1]
        world.send(A, packets.udp(world.way(A, HOSTS[version][0]), PORT, own, b"answer"))
        assert received(host) is not None


def test_a_guests_error_reaches_the_host_that_asked(world: World) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.settimeout(WAIT)
        host.connect(("10.0.1.1", PORT))
        host.send(b"question")
        question = world.taps["a-0"].receive(b"question")
        assert question is not None
        world.send(A, packets.port_unreachable(world.way(A, "10.0.1.254"), question))
        with pytest.raises(ConnectionRefusedError):
            host.recv(1)


def test_what_belongs_to_no_connection_does_not_leave_untranslated(world: World) -> None:
    """NAT sees connections alone: a stray RST would go out with the VM's own address."""
    there = world.internet()
    with there.raw_socket() as line:
        world.send(A, packets.tcp(world.way(A, INTERNET), (4000, PORT), 0x04))
        assert not heard(line, struct.pack("!HII", PORT, 1, 0))
    assert world.kinds("a-0") == {"denied": 1}


def test_the_host_asks_and_answers_who_has_an_address(world: World) -> None:
    tap = world.taps["a-0"]
    ip("neigh flush dev a-0 nud all")
    ip("-6 neigh flush dev a-0 nud all")
    world.send(A, packets.arp(world.way(A, "10.0.1.254").of(to_mac=packets.BROADCAST)))
    assert tap.receive(struct.pack("!H", packets.ARP) + b"\0\x01\x08\0\x06\x04\0\x02"), "ARP answer"
    group = "ff02::1:ff00:fe"
    ask = world.way(A, group).of(to_mac=group_mac(group), source=link_local(A))
    world.send(A, packets.solicit(ask, "fd00:1::fe"))
    assert tap.receive(b"\x88\0"), "neighbour advertisement"
    assert world.kinds("a-0") == {}


def test_what_every_guest_tells_groups_is_counted_and_reaches_nobody(world: World) -> None:
    mdns = world.way(A, "224.0.0.251").of(to_mac="01:00:5e:00:00:fb")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("", 5353))
        group = socket.inet_aton("224.0.0.251") + socket.inet_aton("10.0.1.254")
        server.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        world.send(A, packets.udp(mdns, 5353, 5353))
        world.send(A, packets.udp(mdns.of(destination="255.255.255.255", to_mac=packets.BROADCAST), 1, 5353))
        world.send(A, packets.udp(mdns.of(destination="10.0.1.255", to_mac=packets.BROADCAST), 1, 5353))
        assert received(server, SHORT) is None
    world.send(A, packets.icmp6(world.way(A, ALL_NODES).of(to_mac=group_mac(ALL_NODES)), 128, bytes(4)))
    assert world.kinds("a-0") == {"denied": 4}


def test_dhcp_reaches_the_host_where_it_is_configured(world: World) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        server.bind(("", 67))
        ask = Way(E.mac, packets.BROADCAST, "0.0.0.0", "255.255.255.255")
        world.send(E, packets.dhcp(ask, answer=False))
        assert received(server) is not None
        renew = Way(E.mac, world.taps["e-0"].host_mac(), "10.0.3.7", "10.0.3.254")
        world.send(E, packets.dhcp(renew, answer=False))
        assert received(server) is not None
        world.send(A, packets.dhcp(world.way(A, "10.0.1.254"), answer=False))
        assert received(server, SHORT) is None
    assert world.kinds("a-0") == {"denied": 1}


@BOTH
def test_nobody_outside_reaches_a_vm(world: World, version: int) -> None:
    there, lan = world.internet(), world.lan()
    target = pick(version, "10.0.1.1", "fd00:1::1")
    for outside in (there, lan):
        with outside.udp_socket(PORT, pick(version, "0.0.0.0", "::")) as client:
            client.sendto(b"unasked", (target, PORT))
    assert world.taps["a-0"].receive(b"unasked", SHORT) is None
    assert world.kinds("a-0") == {"inbound": 2}


def test_what_answers_nothing_is_no_reply(world: World) -> None:
    """A guest that says it answers a connection of the LAN's begins one."""
    lan = world.lan()
    with lan.raw_socket() as line:
        for flags in (SYN_ACK, ACK, 0x04, 0x01):
            world.send(A, packets.tcp(world.way(A, LAN), (22, 4000), flags))
        assert not heard(line, struct.pack("!HH", 22, 4000))
    assert world.kinds("a-0") == {"denied": 4}


@BOTH
def test_a_vms_address_from_elsewhere_is_dropped(world: World, version: int) -> None:
    """Somebody in the LAN says to be the VM: neither the host nor another VM takes it for that."""
    lan = world.lan()
    world.change(A, replace(B, allow=(allow("0.0.0.0/0"), allow("::/0"))), E)
    for key in ("all", "lan"):
        set_sysctl(f"net/ipv4/conf/{key}/rp_filter", "0")
    with socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as server:
        server.bind(("", PORT))
        with lan.entered():
            liar = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            liar.bind(("eth0", 0))
        host_mac = mac_of("lan")
        way = Way(lan.mac(), host_mac, pick(version, "10.0.1.1", "fd00:1::1"), HOSTS[version][2])
        honest = way.of(source=pick(version, LAN, LAN6))
        with liar:
            liar.send(packets.udp(way, 1, PORT, b"lie"))
            liar.send(packets.udp(honest, 1, PORT, b"truth"))
        got = received(server)
        assert got is not None
        assert got[0] == b"truth"
    assert world.kinds("lan") == {"elsewhere": 1}


def test_counts_are_told_by_tap(world: World) -> None:
    world.say(A, "10.0.2.1")
    world.say(A, "10.0.2.1")
    world.say(B, "10.0.1.1")
    assert installed.find_drops() == {"a-0": {"denied": 2}, "b-0": {"denied": 1}}
    world.change(B, E)
    assert installed.find_drops() == {"b-0": {"denied": 1}}, "what is gone is not counted on"


def test_an_address_for_dhcp_to_give_comes_from_its_tap_only(world: World) -> None:
    lan = world.lan()
    ip("link set lo up")
    set_sysctl("net/ipv4/conf/all/rp_filter", "0")
    set_sysctl("net/ipv4/conf/lan/rp_filter", "0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server, lan.raw_socket() as line:
        server.bind(("10.0.3.254", PORT))
        line.send(packets.udp(Way(lan.mac(), mac_of("lan"), "10.0.3.7", "10.0.3.254"), 1, PORT, b"lie"))
        server.sendto(b"to itself", ("10.0.3.254", PORT))
        assert received(server) == (b"to itself", "10.0.3.254")
    assert world.kinds("lan") == {"elsewhere": 1}
