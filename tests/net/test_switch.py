"""VM-to-VM networks on real TAPs: who reaches whom, what is answered by whom, and what is dropped."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace

import pytest
from main_loop import run
from net.frames import (
    ARP,
    BROADCAST,
    IPV4,
    Ends,
    advertisement,
    arp,
    ethernet,
    ip_udp,
    router_advertisement,
    solicitation,
)
from net.networks import Desk, gateway_of, make_port, make_router
from vmsilod.errors import StartFailed

A, B, C = make_port("alpha", 2), make_port("beta", 3), make_port("gamma", 4)
LOCAL = "fe80::ff:fe00:2"  # of A's MAC


@pytest.mark.parametrize("version", [4, 6])
def test_any_peer_reaches_any_other_by_ip(version: int) -> None:
    with Desk(A, B, C) as desk:
        guests = [desk.plug(port) for port in (A, B, C)]
        for sender in guests:
            for receiver in guests:
                if sender is not receiver:
                    text = f"{sender.port.vm} to {receiver.port.vm}".encode()
                    sender.udp(receiver.address(version), text)
                    frame = receiver.find(text)
                    assert frame is not None
                    assert frame.macs == Ends(gateway_of(receiver.port), receiver.mac)
        for guest in guests:  # and nobody gets what is another's
            assert not [frame for frame in guest.drain() if frame.payload]


def test_arp_is_answered_by_the_network_itself() -> None:
    with Desk(A, B) as desk:
        alpha, beta = desk.plug(A), desk.plug(B)
        assert alpha.resolve("10.1.0.3") == gateway_of(A)
        assert alpha.resolve("10.1.0.2") is None  # its own: it would think that somebody has it
        assert alpha.resolve("10.1.0.99") is None  # nobody's
        assert not [frame for frame in beta.drain() if frame.kind == ARP]


def test_neighbour_solicitations_are_answered_by_the_network_itself() -> None:
    with Desk(A, B) as desk:
        alpha, beta = desk.plug(A), desk.plug(B)
        for source in ("fd00:1::2", LOCAL):
            alpha.send(solicitation(A.mac, source, "fd00:1::3"))
            frame = alpha.receive()
            assert frame is not None
            assert (frame.raw[54], frame.macs.source) == (136, gateway_of(A))
        alpha.send(solicitation(A.mac, "::", "fd00:1::2"))  # is my address taken?
        assert not alpha.drain()
        assert not beta.drain()


def test_what_is_no_peers_own_is_dropped_and_counted() -> None:
    with Desk(A, B) as desk:
        alpha, beta = desk.plug(A), desk.plug(B)
        gateway, other = gateway_of(A), "02:00:00:00:00:77"
        honest = ip_udp(Ends("10.1.0.2", "10.1.0.3"), b"x")
        lies = {
            "bad_mac": [ethernet(Ends(other, gateway), IPV4, honest)],
            "bad_protocol": [
                ethernet(Ends(A.mac, gateway), IPV4, honest, vlan=7),
                ethernet(Ends(A.mac, gateway), IPV4, honest, vlan=0),
                ethernet(Ends(A.mac, gateway), 0x88CC, b"\0" * 50),
            ],
            "bad_ipv4": [
                ethernet(Ends(A.mac, gateway), IPV4, ip_udp(Ends(source, "10.1.0.3"), b"x"))
                for source in ("10.1.0.4", "10.1.0.3", "127.0.0.1", "192.168.9.1", "0.0.0.0")
            ],
            "bad_ipv6": [
                ethernet(Ends(A.mac, gateway), 0x86DD, ip_udp(Ends(source, "fd00:1::3"), b"x"))
                for source in ("fd00:1::3", "fd00:1::9", "::1", "fe80::1")
            ],
            "bad_arp": [
                ethernet(Ends(A.mac, BROADCAST), ARP, arp(1, sender, (other, "10.1.0.3")))
                for sender in ((A.mac, "10.1.0.3"), (A.mac, "10.1.0.9"), (other, "10.1.0.2"))
            ],
            "bad_nd": [
                solicitation(A.mac, "fd00:1::3", "fd00:1::4"),
                router_advertisement(A.mac, LOCAL),
                router_advertisement(A.mac, "fd00:1::2"),
            ],
        }
        for counter, frames in lies.items():
            for frame in frames:
                alpha.send(frame)
            assert desk.dropped(counter) == len(frames), counter
        alpha.send(advertisement(A.mac, "fd00:1::3", "fd00:1::3"))
        assert desk.dropped("bad_ipv6") == len(lies["bad_ipv6"]) + 1
        assert not beta.drain()
        denied = desk.inside("nft", "list", "set", "netdev", "vmsilo", "denied")
        assert f'"alpha-0" counter packets {sum(map(len, lies.values())) + 1} ' in denied
        views = {view.tap: view for view in run(desk.switches.find_views([B, A]))}
        assert views["alpha-0"].dropped == {"spoofed": sum(map(len, lies.values())) + 1}
        assert views["beta-0"].dropped == {}
        # The truth still passes, and nobody has learned another MAC for beta.
        alpha.udp("10.1.0.3", b"still here")
        assert beta.find(b"still here")


def test_broadcasts_reach_those_who_asked_for_them() -> None:
    ears, deaf = replace(B, receive_broadcast=True), C
    both = replace(make_port("delta", 5), receive_broadcast=True)
    with Desk(A, ears, deaf, both) as desk:
        alpha, beta, gamma, delta = (desk.plug(port) for port in (A, ears, deaf, both))
        for destination in ("255.255.255.255", "10.1.0.255"):
            packet = ip_udp(Ends("10.1.0.2", destination), destination.encode())
            alpha.send(ethernet(Ends(A.mac, BROADCAST), IPV4, packet))
            for listener in (beta, delta):
                frame = listener.find(destination.encode())
                assert frame is not None
                assert frame.macs == Ends(A.mac, BROADCAST)
        delta.send(
            ethernet(Ends(both.mac, BROADCAST), IPV4, ip_udp(Ends("10.1.0.5", "255.255.255.255"), b"d"))
        )
        assert beta.find(b"d")
        for guest in (alpha, gamma, delta):
            assert not [frame for frame in guest.drain() if frame.payload]
        # As somebody else: no copy is made of a lie.
        alpha.send(
            ethernet(Ends(A.mac, BROADCAST), IPV4, ip_udp(Ends("10.1.0.4", "255.255.255.255"), b"no"))
        )
        multicast = ip_udp(Ends("10.1.0.2", "224.0.0.251"), b"no")
        alpha.send(ethernet(Ends(A.mac, "01:00:5e:00:00:fb"), IPV4, multicast))
        assert not [frame for frame in beta.drain() + delta.drain() if frame.payload]


@pytest.mark.parametrize(
    ("served", "there"),
    [("192.168.9.0/24", "192.168.9.7"), ("0.0.0.0/0", "198.51.100.7"), ("fd09::/64", "fd09::7")],
)
def test_a_router_vm_is_the_way_to_what_it_serves(served: str, there: str) -> None:
    router = make_router("router", 254, served)
    with Desk(A, B, router) as desk:
        alpha, beta, gate = desk.plug(A), desk.plug(B), desk.plug(router)
        version = 6 if ":" in there else 4
        alpha.udp(there, b"out")
        frame = gate.find(b"out")
        assert frame is not None
        assert frame.macs == Ends(gateway_of(router), router.mac)
        gate.udp(alpha.address(version), b"back", source=there)
        assert alpha.find(b"back")
        # Serving everything is no leave to be one's neighbour, and what is served is only the router's.
        gate.udp(alpha.address(version), b"a lie", source=beta.address(version))
        beta.udp(alpha.address(version), b"a lie", source=there)
        gate.udp(there, b"round and round")
        for guest in (alpha, beta, gate):
            assert not [frame for frame in guest.drain() if frame.payload]


def test_of_two_routers_the_one_with_the_closer_network_has_it() -> None:
    far, near = (
        make_router("far", 253, "fd00::/8", "192.168.0.0/16"),
        make_router("near", 254, "fd09::/64", "192.168.9.0/24"),
    )
    with Desk(A, far, near) as desk:
        alpha, wide, close = desk.plug(A), desk.plug(far), desk.plug(near)
        for there in ("192.168.9.7", "fd09::7"):
            alpha.udp(there, b"to the near one")
            assert close.find(b"to the near one")
            version = 6 if ":" in there else 4
            wide.udp(alpha.address(version), b"a lie", source=there)
            close.udp(alpha.address(version), b"the truth", source=there)
            assert [frame.payload for frame in alpha.drain() if frame.payload] == [b"the truth"]
        wide.udp(alpha.address(), b"its own", source="192.168.8.1")
        assert alpha.find(b"its own")


def test_the_networks_and_the_host_never_see_each_other() -> None:
    other = make_port("alien", 3, network="other")
    with Desk(A, B, other) as desk:
        alpha, beta, alien = desk.plug(A), desk.plug(B), desk.plug(other)
        # The same address on the host: were there any way to it, it would be used.
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        subprocess.run(["ip", "addr", "add", "10.1.0.3/32", "dev", "lo"], check=True)
        try:
            before = _host_counts()
            for destination in ("10.1.0.3", "127.0.0.1", "192.0.2.1"):
                alpha.udp(destination, b"hello")
            assert beta.find(b"hello")
            beta.udp("10.1.0.2", b"back")
            assert alpha.find(b"back")
            alpha.send(
                ethernet(Ends(A.mac, BROADCAST), IPV4, ip_udp(Ends("10.1.0.2", "255.255.255.255"), b"all"))
            )
            assert not [frame for frame in alien.drain() if frame.payload]
            assert _host_counts() == before
        finally:
            subprocess.run(["ip", "addr", "del", "10.1.0.3/32", "dev", "lo"], check=True)
            subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
        listed = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
        assert [line.split(": ")[1] for line in listed.splitlines()] == ["lo"]
        assert not subprocess.run(["nft", "list", "ruleset"], capture_output=True, check=True).stdout


def _host_counts() -> tuple[str, str]:
    """Every packet and datagram that the host's own namespace has counted."""
    with open("/proc/thread-self/net/dev") as devices, open("/proc/thread-self/net/snmp") as protocols:  # noqa: PTH123
        return devices.read(), protocols.read()


def test_a_port_is_not_opened_while_another_has_it() -> None:
    with Desk(A, B) as desk:
        first = desk.plug(A)
        with pytest.raises(StartFailed, match="another process has it open"):
            run(desk.switches.open(A))
        os.close(first.fd)
        assert desk.plug(A).resolve("10.1.0.3") == gateway_of(A)


def test_a_port_that_is_not_configured_is_not_opened() -> None:
    with Desk(A) as desk, pytest.raises(StartFailed, match="no port for beta's lan"):
        run(desk.switches.open(B))
