"""A piece of internet for the tests with real guests: beyond the host's wan0 a router, and behind that a
server, of IPv4 and IPv6; and what a guest sees of it. Documentation addresses (RFC 5737, RFC 3849).
"""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.container import Container

INTERNET, INTERNET6 = "198.51.100.7", "2001:db8:9::7"
ROUTER, ROUTER6 = "203.0.113.2", "2001:db8:1::2"
WAN, WAN6 = "203.0.113.1", "2001:db8:1::1"
"""The host's own, which masqueraded connections come from."""

SETTINGS = """\
user = "user"
shared_home = false
[host_networking.nat]
enable = true
interface = "wan0"
"""
PLAIN_SETTINGS = 'user = "user"\nshared_home = false\n'
WORLD = f"""
set -e
ip netns add far
ip link add wan0 type veth peer name far0 netns far
ip addr add {WAN}/24 dev wan0
ip addr add {WAN6}/64 dev wan0 nodad
ip link set wan0 up
ip -n far addr add {ROUTER}/24 dev far0
ip -n far addr add {ROUTER6}/64 dev far0 nodad
ip -n far link set far0 up
ip -n far link set lo up
ip -n far addr add {INTERNET}/32 dev lo
ip -n far addr add {INTERNET6}/128 dev lo nodad
ip route add {INTERNET} via {ROUTER}
ip -6 route add {INTERNET6} via {ROUTER6}
"""
# A signal would end what runs it, and not the program in there.
UNTIL_END_OF_INPUT = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
"""
# Says to each who connects, from where that came.
SERVER = """
import socket
s = socket.create_server(("::", 8080), family=socket.AF_INET6, dualstack_ipv6=True)
print("up", flush=True)
while True:
    c, peer = s.accept()
    c.sendall(peer[0].removeprefix("::ffff:").encode())
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


@contextmanager
def internet(host: Container) -> Iterator[None]:
    """With NAT to it, and servers on the host itself and beyond."""
    host.run(["bash", "-c", WORLD])
    prefixes = ((), ("ip", "netns", "exec", "far"))
    try:
        with served(host, *((*prefix, "python3", "-c", SERVER) for prefix in prefixes)):
            host.write("/etc/vmsilo/vmsilo.toml", SETTINGS)
            yield
            host.write("/etc/vmsilo/vmsilo.toml", PLAIN_SETTINGS)
    finally:
        host.run("ip netns del far", check=False)
        host.run("ip link del wan0", check=False)


@contextmanager
def served(host: Container, *commands: tuple[str, ...]) -> Iterator[None]:
    """While these run, each of which has said that it is up. The last word is a program in Python."""
    with ExitStack() as stack:
        for *words, program in commands:
            argv = [*words, UNTIL_END_OF_INPUT + program]
            server = stack.enter_context(host.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            stack.callback(server.communicate)
            assert server.stdout is not None
            assert server.stdout.readline() == b"up\n"
        yield


def define(host: Container, name: str, text: str) -> None:
    """Configure a VM, and wait until its socket is there."""
    host.write(f"/etc/vmsilo/vms.d/{name}.toml", text)
    host.wait_until(f"systemctl -q is-active vmsilo-{name}.socket", seconds=20)


def remove(host: Container, name: str) -> None:
    """And wait until its TAPs are gone."""
    host.run(f"vm-stop --force {name}", check=False)
    host.run(f"rm -f /etc/vmsilo/vms.d/{name}.toml")
    host.wait_until(f"! ls /sys/class/net | grep -q '^{name}-'", seconds=20)


def ask(host: Container, vm: str, address: str) -> str:
    """The address that a connection of this VM comes from, or "closed"."""
    return host.run(["vm-run", vm, "python3", "-c", CLIENT, address], user="user").stdout.strip()


def in_guest(host: Container, vm: str, command: str, *, root: bool = False, check: bool = True) -> str:
    options = ["--root"] if root else []
    return host.run(["vm-run", *options, vm, "sh", "-c", command], user="user", check=check).stdout


def addresses_of(host: Container, vm: str) -> dict[str, set[str]]:
    """What each interface of the guest has, by name."""
    links: list[dict[str, Any]] = json.loads(in_guest(host, vm, "ip -j address"))
    return {
        link["ifname"]: {f"{each['local']}/{each['prefixlen']}" for each in link["addr_info"]}
        for link in links
    }


def shown_of(host: Container, vm: str) -> dict[str, dict[str, Any]]:
    """What `vmsilo status` says of each interface, by name."""
    told = json.loads(host.run(["vmsilo", "status", "--json", vm], check=False).stdout)
    return {port["Interface"]: port for port in told["Network"]}
