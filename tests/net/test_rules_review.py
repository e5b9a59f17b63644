"""What a guest cannot do by what is known already: others' connections, leases, routes, broadcasts."""

from __future__ import annotations

import socket
import struct
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from net import packets
from net.networks import Desk, gateway_of, make_port, make_router
from net.packets import BROADCAST, Way
from net.rules_world import INTERNET, INTERNET6, LAN, LAN6, WAN, WAN6, A, B, C, D, E, World, allow
from net.tap_ground import SHORT, WAIT, heard, ip, mac_of, peer, received, run, set_sysctl
from vmsilod.network import batch, forwarding, nft
from vmsilod.network.ruleset import uses_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from net.tap_ground import Peer

PORT = 7000
BOTH = pytest.mark.parametrize("version", [4, 6])


@pytest.fixture
def world() -> Iterator[World]:
    with World(A, B, E) as made:
        yield made


LAN_HOST, LAN_MACHINE = "192.168.5.2", "192.168.5.7"


@pytest.fixture
def bridged() -> Iterator[tuple[World, Peer]]:
    """Gamma and delta in the bridge br0, gamma with DHCP; and a machine of that LAN."""
    ip("link add br0 type bridge")
    ip(f"addr add {LAN_HOST}/24 dev br0")
    ip("link set br0 up")
    with World(replace(C, dhcp=True), D) as made, peer("port", f"{LAN_MACHINE}/24") as machine:
        ip("link set port master br0")
        made.install()
        yield made, machine


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


@BOTH
def test_a_guest_takes_no_port_of_a_service_of_the_host(world: World, version: int) -> None:
    there = world.internet()
    target, wan = pick(version, INTERNET, INTERNET6), pick(version, WAN, WAN6)
    kind = socket.AF_INET if version == 4 else socket.AF_INET6
    with socket.socket(kind, socket.SOCK_DGRAM) as service, there.udp_socket(PORT, target) as outside:
        service.bind((wan, 1194))
        world.send(A, packets.udp(world.way(A, target), 1194, PORT))
        with there.raw_socket() as line:
            world.send(A, packets.tcp(world.way(A, target), (1194, PORT)))
            assert 32768 <= last_source_port(line) <= 60999
        outside.sendto(b"to the service", (wan, 1194))
        assert received(service) is not None
        assert world.taps["a-0"].receive(b"to the service", SHORT) is None
        assert received(outside) is not None
        world.send(A, packets.ping(world.way(A, target)))
        assert world.taps["a-0"].receive(b"\x81\0" if version == 6 else b"\0\0"), "echo reply"


@pytest.mark.parametrize("target", ["192.168.5.255", "255.255.255.255", "224.0.0.251", LAN_HOST])
def test_an_open_network_does_not_open_the_host_by_a_broadcast(
    bridged: tuple[World, Peer], target: str
) -> None:
    world, machine = bridged
    opened = (allow("192.168.5.0/24"), allow("0.0.0.0/0"))
    world.change(replace(C, allow=opened), D)
    group = "01:00:5e:00:00:fb" if target.startswith("224.") else BROADCAST
    for mac in (group, mac_of("br0")):
        world.send(C, packets.udp(Way(C.mac, mac, "192.168.5.12", target), 1, PORT))
    assert world.passed("c-0") == 0
    assert world.kinds("c-0") == {"denied": 2}
    world.send(C, packets.udp(Way(C.mac, machine.mac(), "192.168.5.12", LAN_MACHINE), 1, PORT))
    assert world.passed("c-0") == 1, "the network itself"
    groups = (allow("224.0.0.0/4"),) if target.startswith("224.") else (allow(target),)
    world.change(replace(C, allow=groups), D)
    world.send(C, packets.udp(Way(C.mac, group, "192.168.5.12", target), 1, PORT))
    assert world.passed("c-0") == 2, "opened by name"


def test_an_open_network_does_not_open_groups_of_ipv6(bridged: tuple[World, Peer]) -> None:
    world, _machine = bridged
    world.change(replace(C, allow=(allow("::/0"),)), D)
    for mac in (packets.group_mac("ff02::fb"), mac_of("br0")):
        world.send(C, packets.udp(Way(C.mac, mac, "fd05::12", "ff02::fb"), 1, PORT))
    assert world.passed("c-0") == 0
    assert world.kinds("c-0") == {"denied": 2}


def test_a_router_vm_cannot_redirect_its_peers() -> None:
    port, router = make_port("beta", 3), make_router("rout", 254, "0.0.0.0/0")
    with Desk(port, router) as desk:
        beta, rout = desk.plug(port), desk.plug(router)
        way = Way(router.mac, gateway_of(router), "10.1.0.254", "10.1.0.3")
        about = packets.udp(way.of(source="10.1.0.3", destination="8.8.8.8"), 1, 2)[14:]
        for kind in (5, 9, 3):
            rout.send(packets.icmp4(way, kind, bytes(4) + about))
        found = [frame.raw[34] for frame in beta.drain() if frame.raw[12:14] == b"\x08\0"]
    assert found == [3]


def test_a_network_that_only_a_route_says_is_near_is_closed(world: World) -> None:
    """An uplink with an address alone (/32, /128), as DHCPv6 gives it."""
    with peer("wan", "198.51.100.7/24", "2001:db8:1::7/64") as machine:
        ip("addr add 198.51.100.2/32 dev wan")
        ip("addr add 2001:db8:1::2/128 dev wan nodad")
        for network, target in (
            ("198.51.100.0/24", "198.51.100.7"),
            ("2001:db8:1::/64", "2001:db8:1::7"),
        ):
            ip(f"route add {network} dev wan")
            ip(f"route add default via {target}")
            world.install()
            with machine.udp_socket(PORT, target) as server:
                world.say(A, target, PORT)
                assert received(server, SHORT) is None
    assert world.kinds("a-0") == {"denied": 2}


@BOTH
def test_lent_forwarding_makes_the_host_no_router_of_its_uplink(
    world: World, tmp_path: Path, version: int
) -> None:
    there, lan = world.internet(), world.lan()
    family = f"ipv{version}"
    key = forwarding.FORWARDING[family]
    if not Path(f"/proc/sys/net/{family}/conf/wan/{key}").exists():
        pytest.skip(f"no {key} of a device")
    there.ip("route add 192.168.1.0/24 via " + WAN)
    there.ip("route add fd07::/64 via " + WAN6)
    target, any_address = pick(version, LAN, LAN6), pick(version, "0.0.0.0", "::")
    lent_file = tmp_path / "lent"
    with lan.udp_socket(PORT, target) as server, there.udp_socket(PORT, any_address) as outside:
        for switch, arrives in (("0", False), ("1", True)):
            set_sysctl(f"net/{family}/conf/all/forwarding", switch)
            text = batch.render(world.plan, lent_file)
            nft.apply(text)
            forwarding.lend_forwarding("wan", lent_file)
            assert batch.render(world.plan, lent_file) == text, "the same before and after"
            outside.sendto(b"through", (target, PORT))
            assert (received(server, WAIT if arrives else SHORT) is not None) == arrives
            internet = pick(version, INTERNET, INTERNET6)
            for tap in ("a-0", "wan"):
                set_sysctl(f"net/{family}/conf/{tap}/{key}", "1")
            world.say(A, internet, PORT)
            assert received(outside) is not None, "VMs are routed all the same"


@pytest.mark.parametrize(
    "command",
    [
        "flush table inet vmsilo",
        "flush table netdev vmsilo",
        "flush chain inet vmsilo forward",
        "flush chain netdev vmsilo in-a-0",
        "flush chain inet vmsilo to_host",
        "flush chain inet vmsilo denied",
        "flush chain netdev vmsilo frame",
        "flush chain netdev vmsilo lie_mac",
        "flush map inet vmsilo denied_logs",
        "insert rule inet vmsilo to_host accept",
        "add chain inet vmsilo more",
    ],
)
def test_rules_that_somebody_changed_are_not_installed(world: World, command: str) -> None:
    world.internet()
    text = world.install()
    assert nft.is_installed(text)
    run("nft", *command.split())
    assert not nft.is_installed(text)
    world.install()
    assert nft.is_installed(text)


@pytest.mark.parametrize("family", ["inet", "netdev"])
def test_each_chain_is_noticed_when_it_is_emptied(world: World, family: str) -> None:
    """One after the other, in one network: each that has a rule at all."""
    world.internet()
    text = world.install()
    filled = [
        name
        for kind, name in uses_in(text)
        if kind == family and "\t\t" in run("nft", "list", "chain", family, "vmsilo", name)
    ]
    assert len(filled) > 10
    for name in filled:
        run("nft", "flush", "chain", family, "vmsilo", name)
        assert not nft.is_installed(text), name
        world.install()
    assert nft.is_installed(text)


def last_source_port(line: socket.socket) -> int:
    """Of the datagram to PORT that came by."""
    while True:
        frame = line.recv(65536)
        at = {b"\x08\x00": 34, b"\x86\xdd": 54}.get(frame[12:14], len(frame))
        if frame[at + 2 : at + 4] == struct.pack("!H", PORT):
            return int(struct.unpack_from("!H", frame, at)[0])


def claim(address: str) -> bytes:
    return packets.arp(Way(C.mac, BROADCAST, address, LAN_MACHINE))


def offer(machine: Peer, world: World, address: str, *, server: str = LAN_MACHINE) -> None:
    """A DHCP answer to gamma, which has arrived when this returns."""
    way = Way(machine.mac(), C.mac, server, "192.168.5.12")
    with machine.raw_socket() as line:
        line.send(packets.dhcp(way, answer=True, mac=C.mac, yours=address))
    assert world.taps["c-0"].receive(IPv4Address(address).packed)


def test_a_lease_comes_from_the_lan_and_is_nobody_elses(bridged: tuple[World, Peer]) -> None:
    world, machine = bridged
    for address, server in (
        ("192.168.5.200", INTERNET),
        (LAN_HOST, LAN_MACHINE),
        ("192.168.5.13", LAN_MACHINE),
    ):
        offer(machine, world, address, server=server)
        world.send(C, claim(address), packets.udp(Way(C.mac, machine.mac(), address, INTERNET), 1, PORT))
    assert world.passed("c-0") == 0
    assert world.kinds("c-0") == {"arp": 3, "ip4": 3}
    offer(machine, world, "192.168.5.200")
    world.send(C, claim("192.168.5.200"))
    assert world.passed("c-0") == 1
    ip("addr add 192.168.5.200/24 dev br0")
    world.install()
    world.send(C, claim("192.168.5.200"))
    assert world.passed("c-0") == 1, "what the host has since then is no lease"


def test_a_dhcp_question_goes_to_the_lan_only(bridged: tuple[World, Peer]) -> None:
    world, machine = bridged
    hidden = Way(C.mac, BROADCAST, "192.168.5.12", INTERNET)
    world.send(C, packets.dhcp(hidden, answer=False))
    assert world.kinds("c-0") == {"denied": 1}, "an address of the internet, in a broadcast frame"
    renew = hidden.of(to_mac=machine.mac(), destination=LAN_MACHINE)
    world.send(C, packets.dhcp(renew, answer=False))
    world.send(C, packets.dhcp(hidden.of(destination="255.255.255.255"), answer=False))
    assert world.passed("c-0") == 2
