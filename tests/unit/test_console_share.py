"""The clients of a VM's console: what they are shown, and who of them writes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from console_host import ConsoleHost, run_host
from relay_host import PATIENCE, Control, wait_until
from vmsilo_console.ring import CAPACITY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from console_host import Client, Terminal

ME = os.getpid()

STRANGER = """
import os, socket, sys
os.chdir(sys.argv[1])
os.setgroups([])
os.setresuid(65534, 65534, 65534)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[2])
sys.stdout.buffer.write(sock.recv(4096))
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[ConsoleHost]:
    with run_host(tmp_path) as host:
        yield host


@pytest.fixture
def control(host: ConsoleHost) -> Control:
    control = host.start()
    host.listen(control)
    return control


@pytest.fixture
def terminal(host: ConsoleHost, control: Control) -> Terminal:
    return host.open(control)


def fill_up(count: int) -> bytes:
    """`count` bytes of numbered lines."""
    data = b"".join(b"line %08d\n" % number for number in range(count // 14 + 1))
    return data[:count]


def test_history_its_end_and_what_is_live(host: ConsoleHost, terminal: Terminal) -> None:
    terminal.write(b"booted\r\n\x1b[1mlogin:\x1b[0m ")
    first = host.attached(history=True)
    first.expect_output(b"booted\r\n\x1b[1mlogin:\x1b[0m ")  # by now it was read
    first.sock.close()
    client = host.client()
    assert client.expect("S") == {"vm": "banking", "running": True, "writer": False, "writer_pid": None}
    client.expect("H")
    assert client.output == b"booted\r\n\x1b[1mlogin:\x1b[0m "
    terminal.write(b"live")
    client.expect_output(b"login:\x1b[0m live")


def test_without_history_there_is_only_what_is_live(host: ConsoleHost, terminal: Terminal) -> None:
    terminal.write(b"before\n")
    host.attached(history=True).expect_output(b"before\n")
    client = host.attached(history=False)
    assert client.output == b""
    terminal.write(b"after\n")
    assert client.expect_output(b"after\n") == b"after\n"


def test_nobody_watches_and_the_vmm_does_not_stall(host: ConsoleHost, terminal: Terminal) -> None:
    data = fill_up(3 * CAPACITY + 12345)
    terminal.write(data)
    reader = host.client(history=False)
    reader.expect("S")
    terminal.write(b"the end\n")
    wait_for_total(host, b"the end\n")
    client = host.client()
    client.expect("S")
    client.expect("H")
    whole = data + b"the end\n"
    assert client.output == whole[-len(client.output) :]
    assert client.output.startswith(b"line ")  # not in the midst of one
    assert CAPACITY - 20 < len(client.output) <= CAPACITY


def wait_for_total(host: ConsoleHost, end: bytes) -> None:
    """Wait until consoled has read as far as `end`."""

    def has_it() -> bool:
        client = host.attached()
        client.sock.close()
        return client.output.endswith(end)

    wait_until(has_it, f"{end!r} in the scroll-back")


def test_several_readers_see_the_same_and_one_writes(host: ConsoleHost, terminal: Terminal) -> None:
    readers = [host.attached() for _ in range(5)]
    writer = host.client(write="ask")
    assert writer.expect("S") == {"vm": "banking", "running": True, "writer": True, "writer_pid": ME}
    writer.expect("H")
    for reader in readers:
        assert reader.expect("W") == {"writer": False, "writer_pid": ME}
    writer.type(b"ls\r")
    assert terminal.read(3) == b"ls\r"
    terminal.write(b"file\r\n")
    for client in (*readers, writer):
        assert client.expect_output(b"file\r\n") == b"file\r\n"


def test_input_of_a_reader_is_ignored_and_said_once(host: ConsoleHost, terminal: Terminal) -> None:
    writer = host.attached(write="ask")
    reader = host.client(write="ask")
    assert reader.expect("S")["writer"] is False
    reader.expect("H")
    for _ in range(3):
        reader.type(b"evil\r")
    assert reader.expect("W") == {"writer": False, "writer_pid": ME}
    writer.type(b"good\r")
    assert terminal.read(5) == b"good\r"
    terminal.write(b"ok")
    assert reader.packet() == ("O", b"ok")  # no second W came before


def test_take_over_and_hand_back(host: ConsoleHost, terminal: Terminal) -> None:
    first = host.attached(write="ask")
    second = host.client(write="take")
    assert second.expect("S")["writer"] is True
    second.expect("H")
    assert first.expect("W") == {"writer": False, "writer_pid": ME}
    first.type(b"lost")
    second.type(b"mine")
    assert terminal.read(4) == b"mine"
    assert first.expect("W")["writer"] is False
    second.sock.close()
    assert first.expect("W") == {"writer": True, "writer_pid": ME}
    first.type(b"back")
    assert terminal.read(4) == b"back"
    first.sock.close()


def test_a_reader_never_becomes_the_writer(host: ConsoleHost, terminal: Terminal) -> None:
    reader = host.attached(write="no")
    writer = host.attached(write="ask")
    assert reader.expect("W") == {"writer": False, "writer_pid": ME}
    writer.sock.close()
    assert reader.expect("W") == {"writer": False, "writer_pid": None}
    terminal.write(b"x")


@pytest.mark.usefixtures("control")
def test_slow_reader_loses_with_a_mark_and_slows_nobody(host: ConsoleHost, terminal: Terminal) -> None:
    slow = host.client()
    quick = host.attached()
    data = fill_up(8 * CAPACITY)
    for start in range(0, len(data), 8192):
        piece = data[start : start + 8192]
        terminal.write(piece)
        quick.expect_output(piece)
    assert quick.output == data  # nothing lost, although the other one took nothing
    terminal.write(b"the end\n")
    slow.expect("S")
    slow.expect("H")
    lost = 0
    seen = b""
    while not slow.output.endswith(b"the end\n"):
        kind, body = slow.packet()
        if kind == "L":
            assert set(body) == {"lost"}
            assert lost == 0  # once, not over and over
            lost, seen = body["lost"], slow.output
        else:
            assert kind == "O"
    assert lost > 0
    assert len(slow.output) + lost == len(data) + 8
    assert slow.output == seen + (data + b"the end\n")[len(seen) + lost :]


def type_until_stuck(client: Client, data: bytes) -> int:
    """How much of `data` was taken before nobody took more for a while."""
    client.sock.settimeout(0.3)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < len(data):
            client.type(data[sent : sent + 4096])
            sent += 4096
    client.sock.settimeout(PATIENCE)
    return sent


def test_guest_that_takes_no_input_stops_its_writer_only(host: ConsoleHost, terminal: Terminal) -> None:
    writer = host.attached(write="ask")
    reader = host.attached()
    data = bytes(range(256)) * 4096
    sent = type_until_stuck(writer, data)
    assert 0 < sent < len(data)
    terminal.write(b"still read\n")
    reader.expect_output(b"still read\n")
    assert terminal.read(sent) == data[:sent]
    writer.type(b"more")
    assert terminal.read(4) == b"more"


def test_stuck_writer_that_leaves_or_is_taken_over(host: ConsoleHost, terminal: Terminal) -> None:
    stuck = host.attached(write="ask")
    type_until_stuck(stuck, b"x" * (1 << 20))
    watcher = host.client(write="no")
    assert watcher.expect("S")["writer_pid"] == ME
    watcher.expect("H")
    stuck.sock.close()
    assert watcher.expect("W") == {"writer": False, "writer_pid": None}  # seen although nobody reads it
    stuck = host.attached(write="ask")
    watcher.expect("W")
    type_until_stuck(stuck, b"y" * (1 << 20))
    taker = host.attached(write="take")
    assert stuck.expect("W") == {"writer": False, "writer_pid": ME}
    taker.type(b"z")
    while terminal.read(1) != b"z":
        pass


def test_end_of_the_run_is_told_after_all_output(host: ConsoleHost, control: Control) -> None:
    terminal = host.open(control)
    clients = [host.attached(), host.attached(write="ask")]
    clients[0].expect("W")
    terminal.write(b"power down\n")
    terminal.end()
    for client in clients:
        assert client.finish() == "ended"
        assert client.output == b"power down\n"
    late = host.client(write="take")
    assert late.expect("S") == {"vm": "banking", "running": False, "writer": False, "writer_pid": None}
    late.expect("H")
    assert late.output == b"power down\n"
    assert late.finish() == "stopped"


def test_slow_reader_still_gets_the_rest_after_the_end(host: ConsoleHost, control: Control) -> None:
    terminal = host.open(control)
    client = host.client()
    data = fill_up(200_000)
    terminal.write(data)
    terminal.end()
    wait_until(lambda: not control.call("list")["vms"][0]["running"], "the end of the run")
    host.open(control, generation="g2").write(b"of the next run")
    assert client.expect("S")["vm"] == "banking"
    client.expect("H")
    assert client.finish() == "ended"
    assert client.output == data


@pytest.mark.parametrize(
    "raw",
    [
        b"A",
        b"Anonsense",
        b"A[]",
        b'A{"history":true}',
        b'A{"history":1,"write":"no"}',
        b'A{"history":true,"write":"yes"}',
        b'A{"history":true,"write":["no"]}',
        b'A{"history":true,"write":"no","more":1}',
        b"Ihello",
        b"Z",
        b"A" + b" " * 5000,
    ],
)
@pytest.mark.usefixtures("terminal")
def test_a_first_packet_that_is_wrong(host: ConsoleHost, raw: bytes) -> None:
    assert host.client(raw=raw).error() == "bad-request"


@pytest.mark.parametrize("packet", [b"I", b'A{"history":true,"write":"no"}', b"Z1", b"I" + b"x" * 4097])
@pytest.mark.usefixtures("terminal")
def test_a_later_packet_that_is_wrong(host: ConsoleHost, packet: bytes) -> None:
    client = host.attached(write="ask")
    client.sock.send(packet)
    assert client.error() == "bad-request"


@pytest.mark.usefixtures("terminal")
def test_at_most_sixteen_clients(host: ConsoleHost) -> None:
    clients = [host.attached() for _ in range(16)]
    assert host.client().error() == "busy"
    clients[0].sock.close()
    wait_until(lambda: host.client().packet()[0] == "S", "a free place")


def test_client_that_asks_nothing_is_sent_away(host: ConsoleHost) -> None:
    control = host.start("request_seconds=0.1")
    host.listen(control)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with sock:
        sock.settimeout(10)
        sock.connect(str(host.directory / "banking-console"))
        answer = sock.recv(4096)
    assert answer[:1] == b"X"
    assert json.loads(answer[1:])["code"] == "timeout"


def test_client_that_does_not_take_the_rest_is_left_behind(host: ConsoleHost) -> None:
    control = host.start("answer_seconds=0.2")
    host.listen(control)
    terminal = host.open(control)
    before = host.count_fds()
    client = host.client()
    terminal.write(fill_up(CAPACITY))
    terminal.end()
    wait_until(lambda: host.count_fds() <= before - 1, "the client's and the terminal's end")
    client.sock.close()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
@pytest.mark.parametrize(("path", "kind"), [("banking-console", b"X"), ("console.sock", b"{")])
def test_peer_of_another_uid_is_refused(host: ConsoleHost, control: Control, path: str, kind: bytes) -> None:
    host.open(control).write(b"secret\n")
    host.directory.chmod(0o711)
    (host.directory / path).chmod(0o666)
    arguments = [sys.executable, "-I", "-S", "-c", STRANGER, str(host.directory), path]
    answer = subprocess.run(arguments, capture_output=True, check=True, timeout=30).stdout
    assert answer.startswith(kind)
    assert b'"denied"' in answer


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
def test_owner_is_admitted(host: ConsoleHost, control: Control) -> None:
    host.open(control)
    host.listen(control, owner=65534)
    host.directory.chmod(0o711)
    (host.directory / "banking-console").chmod(0o666)
    script = STRANGER.replace("sys.stdout", 'sock.send(b\'A{"history":true,"write":"ask"}\'); sys.stdout')
    arguments = [sys.executable, "-I", "-S", "-c", script, str(host.directory), "banking-console"]
    answer = subprocess.run(arguments, capture_output=True, check=True, timeout=30).stdout
    assert answer.startswith(b"S")
    assert json.loads(answer[1:])["writer"] is True
