"""Networks with KVM, vhost-net, kernel vsock and fq_codel, under each VMM: NAT, forwarded ports, a VM-to-VM
network. What is closed is closed, and an honest guest is never called a liar.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .conftest import ON_PCI, VMMS, require_program, write

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Host

SETTINGS = """\
user = "user"
shared_home = false
[host_networking.nat]
enable = true
interface = "wan0"
"""
# Documentation addresses (RFC 5737): the host's own, its next hop, a server behind that.
WAN, ROUTER, INTERNET = "203.0.113.1", "203.0.113.2", "198.51.100.7"
WORLD = f"""
set -e
ip netns add far
ip link add wan0 type veth peer name far0 netns far
ip addr add {WAN}/24 dev wan0
ip link set wan0 up
ip -n far addr add {ROUTER}/24 dev far0
ip -n far link set far0 up
ip -n far link set lo up
ip -n far addr add {INTERNET}/32 dev lo
ip -n far route add 10.77.0.0/16 via {WAN}
ip route add {INTERNET} via {ROUTER}
"""
SMALL = "memory = 512\ncpus = 1\nstart_timeout = 900\n"
FORWARDS = """\
network.forward_ports = [
    {from = "host", host = "127.0.0.1:2222", guest = 8080},
    {from = "guest", guest = 5432, host = 5433},
]
"""
WAN_INTERFACE = """\
[network.interfaces.wan]
tap.host_address = "10.77.1.1/24"
addresses = ["10.77.1.2/24"]
routes = { "0.0.0.0/0" = { via = "10.77.1.1" } }
"""
INNER = """\
[network.interfaces.inner]
type = "vm-switch"
vm_network.name = "inner"
addresses = ["10.88.0.NUMBER/24"]
"""
GUEST, GUEST_INNER, PEER_INNER = "10.77.1.2", "10.88.0.2", "10.88.0.3"
PORT = 8080
MEGABYTES = 8
ALIKE = MEGABYTES << 20
# Tells each who connects where that came from; who asks for much gets much.
SERVER = f"""
import socket, sys, threading
def serve(c, peer):
    with c:
        c.sendall(peer[0].encode() + b" " + sys.argv[1].encode() + b"\\n")
        if c.recv(10) == b"much":
            c.sendall(bytes({ALIKE}))
s = socket.create_server(("0.0.0.0", int(sys.argv[2])))
print("up", flush=True)
while True:
    threading.Thread(target=serve, args=s.accept()).start()
"""
# Prints for each ADDRESS:PORT who answers, and how much came.
CLIENT = """
import socket, sys
for where in sys.argv[2:]:
    address, port = where.rsplit(":", 1)
    try:
        with socket.create_connection((address, int(port)), 6) as s:
            s.settimeout(120)
            s.sendall(sys.argv[1].encode())
            got = b"".join(iter(lambda: s.recv(1 << 16), b""))
        print(got.partition(b"\\n")[0].decode(), len(got.partition(b"\\n")[2]))
    except OSError:
        print("closed")
"""


def at(address: str, port: int = PORT) -> str:
    return f"{address}:{port}"


def from_guest(host: Host, vm: str, *where: str, what: str = "little") -> list[str]:
    return host.vm_run(vm, "python3", "-c", CLIENT, what, *where).stdout.splitlines()


def from_host(host: Host, *where: str, prefix: tuple[str, ...] = ()) -> list[str]:
    argv = [*prefix, "python3", "-c", CLIENT, "little", *where]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()


def serve_in(host: Host, vm: str) -> None:
    host.run(f"vm-run --detach {vm} python3 -c '{SERVER}' {vm} {PORT}", user="user")
    deadline = time.monotonic() + 120
    while from_guest(host, vm, at("127.0.0.1")) == ["closed"]:
        assert time.monotonic() < deadline, f"{vm} does not serve"


@contextlib.contextmanager
def served(*commands: tuple[str, ...]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for command in commands:
            server = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(server.kill)
            assert server.stdout is not None
            assert server.stdout.readline() == "up\n"
        yield


def shown_of(host: Host, vm: str) -> dict[str, dict[str, Any]]:
    told = json.loads(host.read(f"vmsilo status --json {vm}"))
    return {port["Interface"]: port for port in told["Network"]}


@pytest.fixture(scope="module")
def world(host: Host) -> Iterator[Host]:
    """The internet behind wan0, and servers there and on the host."""
    host.run(WORLD)
    settings = Path("/etc/vmsilo/vmsilo.toml")
    before = settings.read_text()
    far = ("ip", "netns", "exec", "far")
    try:
        write(settings, SETTINGS)
        host.reload()
        with served(
            (*far, "python3", "-c", SERVER, "far", str(PORT)),
            ("python3", "-c", SERVER, "host", str(PORT)),
            ("python3", "-c", SERVER, "service", "5433"),
        ):
            yield host
    finally:
        write(settings, before)
        host.reload()
        host.run("ip netns del far")
    # Of the kernel and of our own rules: nothing but what was denied on purpose.
    words = "spoofed|elsewhere|nf_tables|nft_|tun:|vhost|fq_codel|unregister_netdevice"
    said = host.run(f"journalctl -b -k -q --no-pager -o cat -p warning -g '{words}'", check=False).stdout
    assert said == ""


@pytest.fixture(scope="module")
def peer(world: Host) -> Iterator[str]:
    """A VM that is on the VM-to-VM network alone; QEMU's other machine, with vhost-net as well."""
    microvm = VMMS["qemu-microvm"][1]
    with world.vm("lab-peer", SMALL + microvm + INNER.replace("NUMBER", "3")) as name:
        world.run(f"vm-start --wait {name}", timeout=1000)
        serve_in(world, name)
        yield name


@pytest.fixture(scope="module", params=ON_PCI)
def vmm(request: pytest.FixtureRequest, world: Host, peer: str) -> Iterator[str]:
    """The VM lab-net under this VMM: a TAP, the VM-to-VM network, and forwarded ports."""
    del peer
    binary, text = ON_PCI[request.param]
    require_program(binary)
    text = SMALL + text + FORWARDS + WAN_INTERFACE + INNER.replace("NUMBER", "2")
    with world.vm("lab-net", text) as name:
        world.run(f"vm-start --wait {name}", timeout=1000)
        serve_in(world, name)
        yield str(request.param)


def test_tcp_goes_where_it_may_and_nowhere_else(vmm: str, world: Host) -> None:
    closed = [at("10.77.1.1"), at(WAN), at(ROUTER)]  # the host, twice, and its neighbour
    answers = from_guest(world, "lab-net", at(INTERNET), *closed)
    assert answers == [f"{WAN} far 0", "closed", "closed", "closed"]
    assert from_host(world, at(GUEST)) == ["10.77.1.1 lab-net 0"]
    assert from_host(world, at(GUEST), prefix=("ip", "netns", "exec", "far")) == ["closed"]
    port = shown_of(world, "lab-net")["wan"]
    assert port["State"] == "up"
    assert port["Denied"] > 0


def test_vhost_net_carries_the_packets(vmm: str, world: Host) -> None:
    """QEMU itself reads and writes none of them."""
    if not vmm.startswith("qemu"):
        pytest.skip(f"{vmm} is not given vhost-net")
    pid = world.main_pid("lab-net")
    peer = world.main_pid("lab-peer")
    for each, interfaces in ((pid, 2), (peer, 1)):
        opened = [str(path.readlink()) for path in Path(f"/proc/{each}/fd").iterdir()]
        assert opened.count("/dev/vhost-net") == interfaces, "one for each"
    before, carried = shown_of(world, "lab-net")["wan"]["Received"], bytes_by(pid)
    assert from_guest(world, "lab-net", at(INTERNET), what="much") == [f"{WAN} far {ALIKE}"]
    assert shown_of(world, "lab-net")["wan"]["Received"] - before > ALIKE
    assert bytes_by(pid) - carried < ALIKE // 8


def bytes_by(pid: int) -> int:
    """What a process has read and written by system calls."""
    lines = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(lines["rchar"]) + int(lines["wchar"])


def test_forwarded_ports_go_both_ways(vmm: str, world: Host) -> None:
    if vmm != "cloud-hypervisor":  # it has a vsock of its own
        assert world.read("systemctl list-units --no-legend 'vmsilo-lab-net-vsock*'") == ""
    assert from_host(world, at("127.0.0.1", 2222)) == ["127.0.0.1 lab-net 0"]
    assert from_guest(world, "lab-net", at("127.0.0.1", 5432)) == ["127.0.0.1 service 0"]
    assert from_guest(world, "lab-net", at("127.0.0.1", 5432), what="much") == [f"127.0.0.1 service {ALIKE}"]


def test_two_vms_reach_each_other_on_their_network_alone(vmm: str, world: Host) -> None:
    assert from_guest(world, "lab-net", at(PEER_INNER), what="much") == [f"{GUEST_INNER} lab-peer {ALIKE}"]
    answers = from_guest(world, "lab-peer", at(GUEST_INNER), at(GUEST), at(INTERNET), at(WAN))
    assert answers == [f"{PEER_INNER} lab-net 0", "closed", "closed", "closed"]
    holder = world.read("systemctl show -P MainPID vmsilo-inner-switch.service")
    listed = json.loads(world.read(f"nsenter -n -t {holder} tc -j qdisc show"))
    kinds = {entry["dev"]: entry["kind"] for entry in listed if entry.get("root")}
    assert {name: kinds[name] for name in ("lab-net-1", "lab-peer-0")} == {
        "lab-net-1": "fq_codel",
        "lab-peer-0": "fq_codel",
    }
    sent = next(
        entry["bytes"]
        for entry in json.loads(world.read(f"nsenter -n -t {holder} tc -s -j qdisc show dev lab-net-1"))
        if entry["kind"] == "fq_codel"
    )
    assert sent > ALIKE, "and it is what the port's packets go through"
    inner = shown_of(world, "lab-net")["inner"]
    assert (inner["Type"], inner["Network"], inner["State"]) == ("vm-switch", "inner", "up")
    assert inner["Received"] > ALIKE


def test_honest_guests_are_never_called_liars(vmm: str, world: Host) -> None:
    for name in ("lab-net", "lab-peer"):
        for port in shown_of(world, name).values():
            assert set(port["Dropped"]) <= {"inbound"}, port
    assert "lab-net-0" in world.read("nft list chains netdev")
