"""vmsilod's orders to relayd, and what survives a restart."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import stat
import threading
import time
from typing import TYPE_CHECKING

import pytest
from relay_host import SECRET, Control, RelayHost, read_exactly, run_host, wait_until
from vmsilo_wire.payload import encode_error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

POWEROFF_FRAME = b"\x06\0\0\0\0"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[RelayHost]:
    with run_host(tmp_path) as host:
        yield host


@pytest.fixture
def control(host: RelayHost) -> Control:
    control = host.start("dial_seconds=1", "poweroff_seconds=0.3", "publish_seconds=0.01")
    assert host.add(control) == {"ok": True}
    return control


def test_connect_writes_hello_and_the_first_frames(host: RelayHost, control: Control) -> None:
    device = host.device()
    first = os.urandom(50000)
    number = control.send("connect", name="banking", role="root", first=base64.b64encode(first).decode())
    agent = device.agents.get(timeout=5)
    assert agent.hello == {"v": 1, "role": "root", "secret": SECRET}
    assert read_exactly(agent.sock, len(first)) == first
    reply, fds = control.receive()
    assert reply == {"id": number, "ok": True}
    with socket.socket(fileno=fds[0]) as sock:
        sock.sendall(b"more")
        assert read_exactly(agent.sock, 4) == b"more"


def test_dial_says_nothing_and_reads_nothing(host: RelayHost, control: Control) -> None:
    device = host.device()
    device.greeting = b"SSH-2.0-guest\r\n"
    number = control.send("dial", name="banking", port=22)
    sshd = device.dialled.get(timeout=5)
    reply, fds = control.receive()
    assert reply == {"id": number, "ok": True}
    with socket.socket(fileno=fds[0]) as sock:
        assert sock.getblocking()
        assert read_exactly(sock, len(device.greeting)) == device.greeting
        sock.sendall(b"first")
        assert read_exactly(sshd, 5) == b"first"


@pytest.mark.parametrize("port", [0, 21, 80, 700, 701, -1, 2**32, "22", None, True])
def test_only_port_22_is_dialled(host: RelayHost, control: Control, port: object) -> None:
    device = host.device()
    assert control.call("dial", name="banking", port=port)["error"]["code"] == "bad-request"
    assert device.connects == 0


def test_a_port_that_nobody_listens_on_is_told(host: RelayHost) -> None:
    control = host.start("port_dial_seconds=0.3")
    assert host.add(control) == {"ok": True}
    host.device(answer=b"")
    error = control.call("dial", name="banking", port=22)["error"]
    assert error["code"] == "agent-unreachable"
    assert "vsock port 22 of banking" in error["message"]
    assert control.call("dial", name="work", port=22)["error"]["code"] == "not-found"


def test_orders_go_on_while_one_connects(host: RelayHost, control: Control) -> None:
    host.device(answer=None)
    slow = control.send("connect", name="banking", role="user")
    quick = control.send("list")
    assert control.receive()[0]["id"] == quick
    reply, _ = control.receive()
    assert reply["id"] == slow
    assert reply["error"]["code"] == "agent-unreachable"


@pytest.mark.usefixtures("control")
def test_controller_that_leaves_ends_its_orders(host: RelayHost) -> None:
    device = host.device(answer=None)
    other = host.control()
    other.send("connect", name="banking", role="user")
    wait_until(lambda: device.connects == 1, "the attempt")
    before = host.count_fds()
    other.sock.close()
    wait_until(lambda: host.count_fds() == before - 2, "both connections are closed")


def test_removal_ends_a_connect(host: RelayHost, control: Control) -> None:
    device = host.device(answer=None)
    slow = control.send("connect", name="banking", role="user")
    wait_until(lambda: device.connects == 1, "the attempt")
    control.send("remove", name="banking", generation="g1")
    reply, _ = control.receive()
    assert (reply["id"], reply["error"]["code"]) == (slow, "stopping")
    assert control.receive()[0]["ok"]


@pytest.mark.parametrize(
    ("answer", "code"), [(b"", None), (b"\x16\0\0\0\0", None), (encode_error("denied", "no"), "failed")]
)
def test_poweroff_waits_for_the_agent(
    host: RelayHost, control: Control, answer: bytes, code: str | None
) -> None:
    device = host.device()
    host.make_ready()
    number = control.send("poweroff", name="banking")
    agent = device.agents.get(timeout=5)
    assert agent.hello["role"] == "control"
    assert read_exactly(agent.sock, 5) == POWEROFF_FRAME
    if answer:
        agent.sock.sendall(answer)
    else:
        agent.sock.shutdown(socket.SHUT_RDWR)
    reply, fds = control.receive()
    assert reply["id"] == number
    assert fds == []
    assert reply.get("error", {}).get("code") == code


def test_poweroff_without_answer_or_agent_is_an_error(host: RelayHost, control: Control) -> None:
    assert control.call("poweroff", name="banking")["error"]["code"] == "agent-unreachable"
    host.device()
    host.make_ready()
    assert control.call("poweroff", name="banking")["error"]["code"] == "timeout"


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../etc"},
        {"name": "Banking"},
        {"name": "a" * 32},
        {"name": 5},
        {"generation": ""},
        {"generation": "a\nb"},
        {"secret": "ab" * 31},
        {"secret": "zz" * 32},
        {"owner": -1},
        {"owner": True},
        {"start_timeout": 3601},
        {"start_timeout": None},
        {"channel": {"type": "kernel", "cid": 2}},
        {"channel": {"type": "kernel", "cid": 7}},  # with a host-port listener
        {"channel": {"type": "hybrid", "path": "vsock", "uid": 0}},
        {"channel": {"type": "hybrid", "path": "/run/../etc/x", "uid": 0}},
        {"channel": {"type": "tcp"}},
        {"fds": ["command"]},
        {"fds": ["command", "command"]},
        {"fds": ["host-port", "command"]},
        {"fds": [[], {}]},
        {"surprise": 1},
    ],
)
def test_bad_add_is_refused_and_takes_nothing(
    host: RelayHost, control: Control, change: dict[str, object]
) -> None:
    before = host.count_fds()
    assert host.add(control, "work", **change)["error"]["code"] == "bad-request"
    wait_until(lambda: host.count_fds() == before, "the attached descriptors are closed")
    assert [vm["name"] for vm in control.call("list")["vms"]] == ["banking"]


def test_a_cid_belongs_to_one_vm(host: RelayHost, control: Control) -> None:
    def add(name: str) -> object:
        channel = {"type": "kernel", "cid": 7}
        order = {
            "name": name,
            "generation": "g1",
            "secret": SECRET,
            "owner": 0,
            "channel": channel,
            "start_timeout": 5,
            "fds": [],
        }
        return control.call("add", **order).get("ok")

    assert add("one")
    assert add("one")
    assert not add("two")


@pytest.mark.parametrize(
    "packet",
    [
        b"{",
        b"[]",
        b'{"op":"list"}',
        b'{"id":true,"op":"list"}',
        b'{"id":1,"op":"halt"}',
        b'{"id":1,"op":["list"]}',
    ],
)
@pytest.mark.usefixtures("control")
def test_bad_order_is_refused(host: RelayHost, packet: bytes) -> None:
    other = host.control()
    socket.send_fds(other.sock, [packet], [0, 0])
    assert other.receive()[0]["error"]["code"] == "bad-request"
    assert "vms" in other.call("list")


def test_wrong_descriptors_are_refused(host: RelayHost, control: Control) -> None:
    before = host.count_fds()
    with open("/dev/null") as null, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as idle:  # noqa: PTH123
        for fds in ([null.fileno()], [idle.fileno()], [], [null.fileno()] * 10):
            assert control.call("listen-vsock", fds)["error"]["code"] == "bad-request"
    assert control.call("list")["listening_vsock"] is False
    assert host.count_fds() == before


def test_only_root_gives_orders(host: RelayHost) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to be another user")
    host.start()
    host.directory.chmod(0o711)
    pid = os.fork()
    if pid == 0:  # only system calls from here: the test process has threads
        os.chdir(host.directory)
        os.chmod("relay.sock", 0o666)  # noqa: PTH101
        os.setresuid(65534, 65534, 65534)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect("relay.sock")
        os._exit(0 if b'"denied"' in sock.recv(4096) and sock.recv(1) == b"" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_state_is_private(host: RelayHost, control: Control) -> None:
    assert control.call("list")["vms"]
    files = list(host.state.iterdir())
    assert [file.name for file in files] == ["banking.json"]
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600


def test_kill_loses_no_listener_and_no_state(host: RelayHost, control: Control) -> None:
    host.device()
    host.make_ready()
    host.add(control, "work")
    wait_until(
        lambda: set(host.manager.store) == {"cmd-banking", "port-banking", "cmd-work", "port-work"}, "store"
    )
    host.kill()
    client = host.client()
    early = threading.Thread(target=host.say, args=(b"X_VMSILO_AGENT=1\nSTATUS=late", "work"))
    early.start()
    control = host.start()
    early.join()
    packet, agent = client.finish()
    assert packet == {"ok": True}
    assert agent is not None
    agent.close()
    state = {vm["name"]: (vm["ready"], vm["agent"], vm["status"]) for vm in control.call("list")["vms"]}
    assert state == {"banking": (True, True, "Startup finished"), "work": (False, True, "late")}
    assert control.call("remove", name="work", generation="g1") == {"ok": True}
    wait_until(lambda: set(host.manager.store) == {"cmd-banking", "port-banking"}, "store")


def test_sigterm_leaves_everything_for_the_next(host: RelayHost, control: Control) -> None:
    host.make_ready()
    assert control.call("list")["vms"]
    assert host.kill(signal.SIGTERM) == 0
    control = host.start()
    assert [vm["ready"] for vm in control.call("list")["vms"]] == [True]


@pytest.mark.usefixtures("control")
def test_what_does_not_fit_together_is_forgotten(host: RelayHost) -> None:
    wait_until(lambda: "port-banking" in host.manager.store, "the store")
    host.kill()
    os.close(host.manager.store.pop("port-banking")[0])
    for name, content in (("broken", b"{"), ("old", b"{}"), ("a", json.dumps([1]).encode())):
        (host.state / f"{name}.json").write_bytes(content)
    (host.state / "half.json.new").write_bytes(b"{")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stray:
        host.manager.store["cmd-stray"] = [os.dup(stray.fileno())]
        control = host.start()
    assert control.call("list")["vms"] == []
    assert list(host.state.iterdir()) == []
    wait_until(lambda: host.manager.store == {}, "an empty store")
    log = host.log.read_text()
    for name in ("banking", "broken", "old", "a", "stray"):
        assert sum(f"{name}: forgotten" in line or f"-{name}'" in line for line in log.splitlines()) == 1


def test_controller_that_never_reads_is_closed(host: RelayHost) -> None:
    control = host.start("controller_queue=50")
    deaf = host.control()
    deaf.call("subscribe")
    sent = 0
    with contextlib.suppress(BrokenPipeError):
        while sent < 5000:
            deaf.send("list")
            sent += 1
    assert sent < 5000
    assert "does not read" in host.log.read_text()
    assert control.call("list")["vms"] == []


def test_watchdog_is_fed(host: RelayHost) -> None:
    host.start(WATCHDOG_USEC="100000")
    wait_until(lambda: host.manager.messages.count("WATCHDOG=1") >= 3, "WATCHDOG=1")


def test_idle_relay_sleeps(host: RelayHost, control: Control) -> None:
    host.device(answer=b"")
    control.call("list")
    before = host.cpu_seconds()
    client = host.client(wait=0.5)
    time.sleep(0.3)
    assert client.error() == "timeout"
    assert host.cpu_seconds() - before < 0.2
