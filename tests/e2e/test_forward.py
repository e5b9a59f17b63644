"""Forwarded ports of an offline VM with a real guest, and what happens when their parts die."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.container import Container

FILE = "/etc/vmsilo/vms.d/ports.toml"
CONFIG = """memory = 768
[network]
forward_ports = [
    {from = "host", host = "127.0.0.1:2222", guest = 8080},
    {from = "host", host = 2223, guest = 8081},
    {from = "guest", guest = 5432, host = 5433},
]
"""
UNIT = "vmsilo-ports-forward.service"
# Answers each request, which ends with the half-close of its sender, with its length and its SHA-256.
SERVICE = """
import hashlib, socket, sys, threading
def serve(sock):
    with sock:
        data = b"".join(iter(lambda: sock.recv(1 << 20), b""))
        sock.sendall(f"{sys.argv[2]} {len(data)} {hashlib.sha256(data).hexdigest()}".encode())
        if data == b"large":
            sock.sendall(b"x" * (8 << 20))
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],)).start()
"""
# Sends a word, or megabytes, half-closes, prints the answer: cut, with its length behind it.
CLIENT = """
import random, socket, sys, time
what = sys.argv[2]
data = random.Random(1).randbytes(int(what) << 20) if what.isdigit() else what.encode()
begin = time.monotonic()
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 60) as sock:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    answer = b"".join(iter(lambda: sock.recv(1 << 20), b""))
print(answer[:200].rstrip(b"x").decode(), len(answer), f"{time.monotonic() - begin:.3f}")
"""


@pytest.fixture(scope="module")
def ports(host: Container) -> Iterator[Container]:
    """The VM `ports`, started, with a service behind each forward."""
    host.write(FILE, CONFIG)
    host.write("/usr/local/bin/forward-service", SERVICE)
    host.write("/usr/local/bin/forward-client", CLIENT)
    host.wait_until("systemctl -q is-active vmsilo-ports.socket", seconds=20)
    for port, word in (("5433", "outside"), ("2223", "occupant")):
        service = ["python3", "/usr/local/bin/forward-service", port, word]
        host.run(["systemd-run", f"--unit=forward-{word}", *service])
    host.wait_until("ss -ltn | grep -q :2223")
    try:
        refused = host.run(["vm-start", "ports", "--wait"], user="user", check=False)
        assert refused.returncode
        assert "port 2223 of 127.0.0.1 is in use" in refused.stderr
        assert not host.run("ss -ltn | grep :2222", check=False).stdout
        host.run("systemctl stop forward-occupant")
        host.run(["vm-start", "ports", "--wait"], user="user")
        for word in ("8080", "8081"):
            in_guest(host, "sh", "-c", f"exec python3 -c '{SERVICE}' {word} inside >/dev/null 2>&1 &")
        wait_for_answer(host, 2222)
        wait_for_answer(host, 2223)
        yield host
    finally:
        host.run(["vm-stop", "--force", "ports"], user="user", check=False)
        host.run(["rm", "-f", FILE])
        host.wait_until("test ! -e /run/systemd/system/vmsilo-ports.socket", seconds=20)
        assert not host.run(f"systemctl list-units --no-legend --all {UNIT}").stdout
        host.run("systemctl stop forward-outside forward-occupant", check=False)


def in_guest(host: Container, *command: str, check: bool = True) -> str:
    return host.run(["vm-run", "ports", *command], user="user", check=check).stdout


def from_host(host: Container, port: int, what: str = "hello", *, check: bool = True) -> str:
    return host.run(["python3", "/usr/local/bin/forward-client", str(port), what], check=check).stdout


def from_guest(host: Container, port: int, what: str = "hello", *, check: bool = True) -> str:
    return in_guest(host, "python3", "-c", CLIENT, str(port), what, check=check)


def wait_for_answer(host: Container, port: int) -> None:
    deadline = time.monotonic() + 60
    while not from_host(host, port, check=False).startswith("inside "):
        assert time.monotonic() < deadline, f"no answer at {port}"
        time.sleep(0.2)


def test_an_offline_guest_is_reached_and_reaches_what_it_may(ports: Container) -> None:
    assert in_guest(ports, "ls", "/sys/class/net").split() == ["lo"]
    assert from_host(ports, 2222).startswith("inside 5 ")
    assert from_guest(ports, 5432).startswith("outside 5 ")
    # The guest's loopback has the one port of the host's, and no other.
    assert not from_guest(ports, 5433, check=False)
    assert not from_guest(ports, 2222, check=False)


def test_megabytes_arrive_unchanged(ports: Container) -> None:
    sent_in, sent_out = from_host(ports, 2222, "8").split(), from_guest(ports, 5432, "8").split()
    assert sent_in[:2] == ["inside", str(8 << 20)]
    assert sent_out[:3] == ["outside", *sent_in[1:3]]
    received_in, received_out = (
        from_host(ports, 2222, "large").split(),
        from_guest(ports, 5432, "large").split(),
    )
    assert int(received_in[3]) > 8 << 20
    assert int(received_out[3]) > 8 << 20


def test_the_forwarder_has_no_rights(ports: Container) -> None:
    pid = ports.run(["systemctl", "show", "--property=MainPID", "--value", UNIT]).stdout.strip()
    status = ports.run(["cat", f"/proc/{pid}/status"]).stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(fields["Uid"].split()[0]) > 60000
    assert int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"] == "1"


def test_daemons_that_restart_are_not_noticed(ports: Container) -> None:
    ports.run("systemctl kill -s KILL vmsilod.service vmsilo-relayd.service")
    wait_for_answer(ports, 2222)
    assert from_guest(ports, 5432).startswith("outside ")
    ports.run("systemctl restart vmsilod.service")
    assert from_host(ports, 2223).startswith("inside ")
    ports.run("systemctl restart vmsilo-relayd.service")
    wait_for_answer(ports, 2223)
    assert from_guest(ports, 5432).startswith("outside ")


def test_a_killed_forwarder_keeps_its_ports(ports: Container) -> None:
    before = ports.run(["systemctl", "show", "--property=MainPID", "--value", UNIT]).stdout
    ports.run(["systemctl", "kill", "-s", "KILL", UNIT])
    assert from_host(ports, 2222).startswith("inside ")  # it waits in the queue of the listener
    assert ports.run(["systemctl", "show", "--property=MainPID", "--value", UNIT]).stdout != before
    ports.run("systemctl kill -s KILL vmsilod.service")
    ports.run(["systemctl", "kill", "-s", "KILL", UNIT])
    wait_for_answer(ports, 2223)
    deadline = time.monotonic() + 30
    while not from_guest(ports, 5432, check=False).startswith("outside "):
        assert time.monotonic() < deadline, "the guest's port does not come back"


def test_the_ports_end_with_the_vm_even_without_vmsilod(ports: Container) -> None:
    pid = ports.run(["systemctl", "show", "--property=MainPID", "--value", "vmsilo-ports-vm.service"]).stdout
    ports.run("systemctl stop vmsilod.socket vmsilod.service")
    try:
        ports.run(["kill", "-KILL", pid.strip()])
        ports.wait_until(f"! systemctl -q is-active {UNIT}", seconds=30)
        assert not ports.run("ss -ltn | grep -E ':222[23]'", check=False).stdout
    finally:
        ports.run("systemctl start vmsilod.socket vmsilod.service")
    ports.run(["vm-start", "ports", "--wait"], user="user")
    assert ports.run("ss -ltn | grep -c -E ':222[23]'").stdout.strip() == "2"
