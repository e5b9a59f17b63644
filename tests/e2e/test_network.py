"""What a real guest has when its first command runs: names, addresses of every kind, routes, name servers;
what it reaches by IPv6, and what becomes of it where nobody answers its DHCP.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from e2e.internet import (
    INTERNET,
    INTERNET6,
    ROUTER,
    ROUTER6,
    WAN,
    WAN6,
    addresses_of,
    ask,
    define,
    in_guest,
    internet,
    remove,
    served,
    shown_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.container import Container

# By its position the first would be eth0 and the second eth1.
VM = f"""\
memory = 768
network.nameservers = ["{ROUTER}"]
network.allow = ["192.168.7.1:8080/tcp"]
[network.interfaces.eth1]
mac_address = "52:54:00:00:00:01"
tap.host_address = "10.77.4.1/24"
tap.host_address_v6 = "fd77:4::1/64"
addresses = ["10.77.4.2/24"]
routes = {{ "0.0.0.0/0" = {{ via = "10.77.4.1" }} }}
v6_addresses = ["fd77:4::2/64"]
v6_routes = {{ "::/0" = {{ via = "fd77:4::1" }} }}
[network.interfaces.eth0]
tap.bridge = "br0"
dhcp = true
"""
DRY = """\
memory = 768
[network.interfaces.wan]
tap.bridge = "br0"
dhcp = true
"""
LAN, LEASED = "192.168.7.1", "192.168.7.55"
WORLD = f"""
set -e
ip link add br0 type bridge
ip link set br0 up
ip netns add lan
ip link add lan0 type veth peer name eth0 netns lan
ip link set lan0 master br0 up
ip -n lan addr add {LAN}/24 dev eth0
ip -n lan link set eth0 up
"""
# Gives everybody the same address.
DHCP_SERVER = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
s.bind(("0.0.0.0", 67))
print("up", flush=True)
server, leased = socket.inet_aton("192.168.7.1"), socket.inet_aton("192.168.7.55")
while True:
    asked = s.recv(1500)
    kind = asked[asked.index(b"\\x35\\x01", 240) + 2]
    if kind not in (1, 3):  # DISCOVER, REQUEST; the answers are OFFER and ACK (RFC 2131)
        continue
    head = b"\\2\\1\\6\\0" + asked[4:8] + bytes(8) + leased + server + bytes(4) + asked[28:44] + bytes(192)
    answer = b"\\2" if kind == 1 else b"\\5"
    options = ((53, answer), (54, server), (51, b"\\0\\0\\x0e\\x10"), (1, b"\\xff\\xff\\xff\\0"))
    told = b"".join(bytes([number, len(value)]) + value for number, value in options)
    s.sendto(head + b"\\x63\\x82\\x53\\x63" + told + b"\\xff", ("255.255.255.255", 68))
"""
# Knows of every name one IPv4 address.
NAME_SERVER = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("203.0.113.2", 53))
print("up", flush=True)
while True:
    query, peer = s.recvfrom(512)
    end = query.index(b"\\0", 12) + 5
    answers = query[end - 4 : end - 2] == b"\\0\\1"
    head = query[:2] + b"\\x81\\x80\\0\\1" + (b"\\0\\1" if answers else b"\\0\\0") + bytes(4)
    record = b"\\xc0\\x0c\\0\\1\\0\\1" + (60).to_bytes(4, "big") + b"\\0\\4" + bytes([192, 0, 2, 7])
    s.sendto(head + query[12:end] + (record if answers else b""), peer)
"""
WEB = """
import socket
s = socket.create_server(("192.168.7.1", 8080))
print("up", flush=True)
while True:
    c, peer = s.accept()
    c.sendall(peer[0].encode())
    c.close()
"""
# ICMPv6 type 134 to all nodes, from the guest's own link-local address: "I am a router".
ADVERTISE = """
import socket, struct
s = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
at = ("ff02::1", 0, 0, socket.if_nametoindex("eth1"))
for _ in range(3):
    s.sendto(struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0), at)
"""


def in_lan(program: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", "lan", "python3", "-c", program)


@pytest.fixture(scope="module")
def world(host: Container) -> Iterator[Container]:
    """The internet with a name server; the bridge br0, where nobody gives addresses yet."""
    with internet(host):
        host.run(["bash", "-c", WORLD])
        try:
            with served(host, ("ip", "netns", "exec", "far", "python3", "-c", NAME_SERVER), in_lan(WEB)):
                yield host
        finally:
            host.run("ip netns del lan; ip link del br0", check=False)


@pytest.fixture(scope="module")
def nets(world: Container) -> Iterator[Container]:
    """The VM `nets`; its first command starts it."""
    with served(world, in_lan(DHCP_SERVER)):
        define(world, "nets", VM)
        try:
            yield world
        finally:
            remove(world, "nets")


def test_a_guest_to_which_nobody_gives_an_address_is_ready_without_one(world: Container) -> None:
    """Before the others: for these somebody does."""
    define(world, "dry", DRY)
    try:
        world.run(["vm-start", "dry", "--wait"], user="user")
        assert addresses_of(world, "dry")["wan"] == set()
        failed = in_guest(world, "dry", "systemctl list-units --failed --plain --no-legend")
        assert failed.split()[0] == "systemd-networkd-wait-online.service"
        shown = in_guest(world, "dry", "networkctl --no-legend list wan")
        assert "configuring" in shown
        # It goes on asking.
        with served(world, in_lan(DHCP_SERVER)):
            deadline = time.monotonic() + 120
            while addresses_of(world, "dry")["wan"] != {f"{LEASED}/24"}:
                assert time.monotonic() < deadline
                time.sleep(1)
    finally:
        remove(world, "dry")


def test_the_first_command_finds_addresses_of_every_kind_and_no_advertised_ones(nets: Container) -> None:
    addresses = addresses_of(nets, "nets")
    assert addresses.keys() == {"lo", "eth1", "eth0"}
    assert addresses["eth1"] == {"10.77.4.2/24", "fd77:4::2/64", "fe80::5054:ff:fe00:1/64"}
    assert addresses["eth0"] == {f"{LEASED}/24"}


def test_names_are_right_before_systemd_starts(nets: Container) -> None:
    kernel = in_guest(nets, "nets", "dmesg", root=True).splitlines()
    renamed = [number for number, line in enumerate(kernel) if "renamed from" in line]
    started = next(number for number, line in enumerate(kernel) if "systemd[1]" in line)
    assert renamed
    assert renamed[-1] < started


def test_packets_pass_by_both(nets: Container) -> None:
    routes: list[dict[str, Any]] = json.loads(in_guest(nets, "nets", "ip -j route show default"))
    assert [(route["gateway"], route["dev"]) for route in routes] == [("10.77.4.1", "eth1")]
    assert ask(nets, "nets", INTERNET) == WAN
    assert ask(nets, "nets", LAN) == LEASED


def test_ipv6_is_as_open_and_as_closed(nets: Container) -> None:
    if nets.run("test -e /proc/sys/net/ipv6/conf/wan0/force_forwarding", check=False).returncode:
        pytest.skip("this kernel forwards IPv6 of all devices or none (force_forwarding: Linux 6.17)")
    assert nets.run(["cat", "/proc/sys/net/ipv6/conf/all/forwarding"]).stdout == "0\n"
    assert ask(nets, "nets", INTERNET6) == WAN6
    for closed in ("fd77:4::1", WAN6, ROUTER6):  # this host, and a neighbour of it
        assert ask(nets, "nets", closed) == "closed"
    assert shown_of(nets, "nets")["eth1"]["Denied"] > 0


def test_a_guest_is_no_router(nets: Container) -> None:
    before = nets.run("ip -6 route; ip -6 addr show dev nets-0").stdout
    assert shown_of(nets, "nets")["eth1"]["Dropped"] == {}, "an honest guest says nothing false"
    nets.run(["vm-run", "--root", "nets", "python3", "-c", ADVERTISE], user="user")
    assert shown_of(nets, "nets")["eth1"]["Dropped"] == {"router": 3}
    assert "dropped: 3 router" in nets.run(["vmsilo", "status", "nets"]).stdout
    assert nets.run("ip -6 route; ip -6 addr show dev nets-0").stdout == before


def test_names_are_looked_up(nets: Container) -> None:
    """Of a neighbour of the host's, of which port 53 alone is open."""
    assert in_guest(nets, "nets", "getent ahostsv4 vmsilo.example").split()[0] == "192.0.2.7"
    assert ask(nets, "nets", ROUTER) == "closed"


def test_an_offline_guest_runs_nothing_for_networks(demo: Container) -> None:
    shown = demo.run(
        ["vm-run", "demo", "systemctl", "is-active", "systemd-networkd", "systemd-resolved"],
        user="user",
        check=False,
    )
    assert shown.stdout.split() == ["inactive", "inactive"]
    assert (
        demo.run(["vm-run", "demo", "pgrep", "-fc", "networkd|resolved"], user="user", check=False).stdout
        == "0\n"
    )
