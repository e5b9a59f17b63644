"""A real guest behind a TAP: out through NAT, and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.container import Container

SETTINGS = """\
user = "user"
shared_home = false
[host_networking.nat]
enable = true
interface = "wan0"
"""
VM = """\
memory = 768
cpus = 2
[network.interfaces.wan]
tap.host_address = "10.77.1.1/24"
addresses = ["10.77.1.2/24"]
routes = { "0.0.0.0/0" = { via = "10.77.1.1" } }
"""
INTERNET = "198.51.100.7"
# Says to each who connects, from where that came.
SERVER = """
import socket, sys
s = socket.create_server(("0.0.0.0", 8080))
print("up", flush=True)
while True:
    c, peer = s.accept()
    c.sendall(peer[0].encode())
    c.close()
"""
CLIENT = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], 8080), 3) as s:
        print(s.recv(100).decode())
except OSError:
    print("closed")
"""


@pytest.fixture(scope="module")
def online(host: Container) -> Iterator[Container]:
    """The VM `online`; beyond wan0 a router, and behind that the internet."""
    host.run(
        "ip netns add far && ip link add wan0 type veth peer name far0 netns far"
        " && ip addr add 203.0.113.1/24 dev wan0 && ip link set wan0 up"
        " && ip -n far addr add 203.0.113.2/24 dev far0 && ip -n far link set far0 up"
        f" && ip -n far link set lo up && ip -n far addr add {INTERNET}/32 dev lo"
        f" && ip route add {INTERNET} via 203.0.113.2"
    )
    servers = [
        host.popen([*prefix, "python3", "-c", SERVER], stdout=-1)
        for prefix in ((), ("ip", "netns", "exec", "far"))
    ]
    for server in servers:
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
    host.write("/etc/vmsilo/vmsilo.toml", SETTINGS)
    host.write("/etc/vmsilo/vms.d/online.toml", VM)
    host.wait_until("systemctl -q is-active vmsilo-online.socket", seconds=20)
    yield host
    host.run("vm-stop --force online", check=False)
    host.run("rm /etc/vmsilo/vms.d/online.toml")
    host.write("/etc/vmsilo/vmsilo.toml", 'user = "user"\nshared_home = false\n')
    host.wait_until("! test -e /sys/class/net/online-0", seconds=20)
    host.run("ip netns del far")
    for server in servers:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


def ask(host: Container, address: str, vm: str = "online") -> str:
    return host.run(["vm-run", vm, "python3", "-c", CLIENT, address], user="user").stdout.strip()


def test_the_internet_is_reached_through_nat_alone(online: Container) -> None:
    assert ask(online, INTERNET) == "203.0.113.1"
    assert ask(online, "10.77.1.1") == "closed"  # this host
    assert ask(online, "203.0.113.1") == "closed"
    assert ask(online, "203.0.113.2") == "closed"  # a neighbour of this host
    assert online.run(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout == "0\n"
    shown = online.run(["vmsilo", "status", "online"]).stdout
    assert "network wan (online-0): up, " in shown
    assert "packets denied" in shown


def test_what_is_allowed_is_open_at_once(online: Container) -> None:
    online.write("/etc/vmsilo/vms.d/online.toml", 'network.allow = ["203.0.113.2:8080/tcp"]\n' + VM)
    online.wait_until("nft list ruleset | grep -q 203.0.113.2", seconds=20)
    assert ask(online, "203.0.113.2") == "203.0.113.1"
    assert ask(online, "10.77.1.1") == "closed"


def test_a_vm_without_interfaces_has_only_its_own_loopback(online: Container) -> None:
    links = online.run(["vm-run", "other", "ls", "/sys/class/net"], user="user").stdout.split()
    assert [name for name in links if name != "lo"] == []
    assert ask(online, INTERNET, vm="other") == "closed"


def test_the_guest_goes_on_through_a_crash_of_vmsilod(online: Container) -> None:
    online.run("systemctl kill --kill-whom=main --signal=KILL vmsilod.service")
    assert ask(online, INTERNET) == "203.0.113.1"
    online.wait_until("systemctl -q is-active vmsilod.service", seconds=20)
    assert ask(online, INTERNET) == "203.0.113.1"
