"""vmsilod's orders to consoled, the lines in a unit's journal, and what survives a kill."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from typing import TYPE_CHECKING

import pytest
from console_host import ConsoleHost, Terminal, run_host
from relay_host import Control, wait_until
from vmsilo_console.ring import CAPACITY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def host(tmp_path: Path) -> Iterator[ConsoleHost]:
    with run_host(tmp_path) as host:
        yield host


@pytest.fixture
def control(host: ConsoleHost) -> Control:
    control = host.start()
    host.listen(control)
    return control


def show(control: Control, name: str = "banking") -> dict[str, object]:
    [vm] = [vm for vm in control.call("list")["vms"] if vm["name"] == name]
    return dict(vm)


def read_history(host: ConsoleHost, name: str = "banking") -> bytes:
    client = host.client(name)
    client.expect("S")
    client.expect("H")
    client.sock.close()
    return client.output


def test_a_run_from_begin_to_end(host: ConsoleHost, control: Control) -> None:
    state = {"name": "banking", "owner": 1000, "listening": True, "generation": None, "running": False}
    assert show(control) == state
    terminal = host.open(control)
    assert show(control) == {**state, "generation": "g1", "running": True}
    terminal.write(b"text\n")
    terminal.end()
    wait_until(lambda: show(control) == {**state, "generation": "g1"}, "the end of the run")
    assert control.call("close", name="banking", generation="g1") == {"ok": True}
    assert show(control) == state
    assert read_history(host) == b"text\n"
    host.open(control, generation="g2")
    assert read_history(host) == b""


def test_close_ends_a_run_that_still_has_its_terminal(host: ConsoleHost, control: Control) -> None:
    terminal = host.open(control)
    terminal.write(b"text\n")
    client = host.attached()
    client.expect_output(b"text\n")
    assert control.call("close", name="banking", generation="other") == {"ok": True}
    assert show(control)["running"] is True
    assert control.call("close", name="banking", generation="g1") == {"ok": True}
    assert client.finish() == "ended"
    with pytest.raises(OSError, match="Input/output"):
        os.write(terminal.slave, b"x")  # nobody has the master side any more, systemd's store included
    assert read_history(host) == b"text\n"


def test_same_run_again_keeps_scroll_back_and_clients(host: ConsoleHost, control: Control) -> None:
    host.open(control).write(b"one\n")
    client = host.attached()
    client.expect_output(b"one\n")
    host.open(control).write(b"two\n")
    client.expect_output(b"one\ntwo\n")


def test_forget_leaves_nothing(host: ConsoleHost, control: Control) -> None:
    terminal = host.open(control, journal=host.journal())
    client = host.attached()
    assert control.call("forget", name="banking") == {"ok": True}
    assert client.finish() == "removed"
    assert control.call("list") == {"ok": True, "vms": []}
    assert list(host.state.iterdir()) == []
    wait_until(lambda: host.manager.store == {}, "an empty descriptor store")
    with pytest.raises(OSError, match="Input/output"):
        os.write(terminal.slave, b"x")
    assert control.call("forget", name="banking") == {"ok": True}


def test_new_listener_and_owner(host: ConsoleHost, control: Control) -> None:
    host.open(control)
    host.listen(control, owner=1001)
    assert show(control)["owner"] == 1001
    host.attached()


def test_subscribe_is_answered(host: ConsoleHost) -> None:
    control = host.start()
    assert control.call("subscribe") == {"ok": True}


def stream_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


ORDER = {"name": "work", "generation": "g1", "fds": ["master"]}


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../etc"},
        {"name": "Work"},
        {"name": 5},
        {"generation": ""},
        {"generation": "a b"},
        {"fds": []},
        {"fds": ["journal"]},
        {"fds": ["master", "journal"]},
        {"fds": "master"},
        {"fds": None},
        {"surprise": 1},
    ],
)
def test_bad_open_is_refused_and_takes_nothing(
    host: ConsoleHost, control: Control, change: dict[str, object]
) -> None:
    before = host.count_fds()
    terminal = Terminal()
    answer = control.call("open", [terminal.master], **{**ORDER, **change})
    assert answer["error"]["code"] == "bad-request"
    terminal.drop_master()
    wait_until(lambda: host.count_fds() == before, "the attached descriptors are closed")
    with pytest.raises(OSError, match="Input/output"):
        os.write(terminal.slave, b"x")
    terminal.end()
    assert [vm["name"] for vm in control.call("list")["vms"]] == ["banking"]


def test_descriptors_of_the_wrong_kind_are_refused(host: ConsoleHost, control: Control) -> None:
    before = host.count_fds()
    terminal = Terminal()
    left, right = stream_pair()
    packets, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right, packets, other, (host.directory / "log").open() as file:
        for fds, names in (
            ([terminal.slave], ["master"]),
            ([left.fileno()], ["master"]),
            ([file.fileno()], ["master"]),
            ([terminal.master, file.fileno()], ["master", "journal"]),
            ([terminal.master, packets.fileno()], ["master", "journal"]),
            ([terminal.master, left.fileno(), right.fileno()], ["master", "journal"]),
        ):
            answer = control.call("open", fds, **{**ORDER, "fds": names})
            assert answer["error"]["code"] == "bad-request", (fds, names)
        for fd in (left.fileno(), packets.fileno(), file.fileno(), terminal.master):
            answer = control.call("listen", [fd], name="work", owner=1000)
            assert answer["error"]["code"] == "bad-request"
        assert control.call("listen", name="work", owner=1000)["error"]["code"] == "bad-request"
        for owner in (-1, True, "1000", None):
            answer = control.call("listen", [left.fileno()], name="work", owner=owner)
            assert answer["error"]["code"] == "bad-request"
    terminal.drop_master()
    terminal.end()
    wait_until(lambda: host.count_fds() == before, "the attached descriptors are closed")
    assert [vm["name"] for vm in control.call("list")["vms"]] == ["banking"]


@pytest.mark.parametrize(
    "packet", [b"{", b"[]", b"{}", b'{"id":1}', b'{"id":1,"op":"x"}', b'{"id":-1,"op":"list"}']
)
def test_wrong_orders_are_answered(host: ConsoleHost, control: Control, packet: bytes) -> None:
    control.sock.send(packet)
    reply, _ = control.receive()
    assert reply["error"]["code"] == "bad-request"
    assert control.call("list")["ok"]


def test_too_many_vms_are_refused(host: ConsoleHost) -> None:
    control = host.start("vms=2")
    for name in ("one", "two"):
        host.listen(control, name)
    sock = host.listen_at("three-console")
    assert control.call("listen", [sock.fileno()], name="three", owner=1)["error"]["code"] == "busy"


def test_lines_of_a_hostile_guest_in_the_journal(host: ConsoleHost, control: Control) -> None:
    journal = host.journal()
    terminal = host.open(control, journal=journal)
    for chunk in (
        b"\x1b[2J\x1b[1mwel",  # lines in pieces
        b"come\x1b[0m\r\n\r\n\n",
        b"<0>panic\x00\nMESSAGE=fake\n",
        b"\x1b]0;title\x07\x1bP1;2q#\x1b\\\n",
        b"10%\r20%\r30%\rdone\n",
        b"bad \xff\x9b byte\n",
        b"x" * 9000 + b"\nnext\n",
        b"login: ",
    ):
        terminal.write(chunk)
    terminal.end()
    assert journal.rest().split(b"\n") == [
        b"<6>console: welcome",
        b"<6>console: <0>panic",
        b"<6>console: MESSAGE=fake",
        b"<6>console: done",
        b"<6>console: bad \\xff\\x9b byte",
        b"<6>console: " + b"x" * 509 + "…".encode(),
        b"<6>console: next",
        b"<6>console: login:",
        b"",
    ]


def test_a_flood_of_lines_is_cut_and_counted(host: ConsoleHost) -> None:
    control = host.start("log_burst=50", "log_rate=10", "notice_seconds=0.2")
    host.listen(control)
    journal = host.journal()
    terminal = host.open(control, journal=journal)
    terminal.write(b"".join(b"line %d\n" % number for number in range(5000)))
    taken = journal.lines(51)
    assert taken[:50] == [b"<6>console: line %d" % number for number in range(50)]
    seen, dropped = 50, 0
    found = taken[50:]
    while seen + dropped < 5000:
        for line in found:
            if match := re.fullmatch(rb"<5>console: (\d+) lines were dropped", line):
                dropped += int(match[1])
            else:
                assert line.startswith(b"<6>console: line ")
                seen += 1
        found = journal.lines(1) if seen + dropped < 5000 else []
    assert seen + dropped == 5000
    assert seen < 200
    time.sleep(0.3)  # three more tokens
    terminal.write(b"quiet again\n")
    assert journal.lines(1) == [b"<6>console: quiet again"]
    terminal.end()


def test_full_journal_stream_stops_nobody_and_tears_no_line(host: ConsoleHost) -> None:
    control = host.start("log_burst=100000", "notice_seconds=0.2")
    host.listen(control)
    journal = host.journal()
    terminal = host.open(control, journal=journal)
    count = 20_000
    data = b"".join(b"%06d %s\n" % (number, b"y" * 60) for number in range(count))
    terminal.write(data)
    client = host.attached()
    terminal.write(b"\nthe end\n")
    client.expect_output(b"the end\n")  # all was read, although the journal took little of it
    seen, dropped = 0, 0
    while seen + dropped < count + 1:
        [line] = journal.lines(1)
        if match := re.fullmatch(rb"<5>console: (\d+) lines were dropped", line):
            dropped += int(match[1])
        else:
            assert re.fullmatch(rb"<6>console: (\d{6} y{60}|the end)", line), line
            seen += 1
    assert seen > 0
    assert dropped > 0
    assert os.get_blocking(journal.unit.fileno())  # the unit's processes share these flags
    terminal.end()


def test_without_a_stream_lines_have_the_vm_s_name(host: ConsoleHost, control: Control) -> None:
    terminal = host.open(control)
    terminal.write(b"hello\n")
    wait_until(lambda: "<6>banking: console: hello\n" in host.log.read_text(), "the line")
    journal = host.journal()
    terminal = host.open(control, generation="g2", journal=journal)
    terminal.write(b"first\n")
    assert journal.lines(1) == [b"<6>console: first"]
    journal.end.close()
    terminal.write(b"second\n")
    wait_until(lambda: "<6>banking: console: second\n" in host.log.read_text(), "the line")
    terminal.end()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_consoled_goes_on(host: ConsoleHost, control: Control, number: signal.Signals) -> None:
    journal = host.journal()
    terminal = host.open(control, journal=journal)
    data = b"".join(b"line %08d\n" % count for count in range(CAPACITY // 14 * 2))
    terminal.write(data)
    before = host.attached().output
    wait_until(lambda: len(host.manager.store) == 4, "four stored descriptors")
    journal.drain()
    host.kill(number)
    terminal.write(b"while nobody was there\n")
    again = host.start()
    assert show(again) == {
        "name": "banking",
        "owner": 1000,
        "listening": True,
        "generation": "g1",
        "running": True,
    }
    client = host.client(write="ask")
    assert client.expect("S")["writer"] is True
    wait_until(lambda: read_history(host).endswith(b"there\n"), "what was written meanwhile")
    history = read_history(host)
    whole = data + b"while nobody was there\n"
    assert history == whole[-len(history) :]
    assert len(history) > CAPACITY - 20
    assert before in data
    assert before
    client.type(b"typed")
    assert terminal.read(5) == b"typed"
    terminal.write(b"to the journal\n")
    terminal.end()
    assert journal.rest().endswith(b"<6>console: to the journal\n")


def test_scroll_back_of_an_ended_run_survives_a_kill(host: ConsoleHost, control: Control) -> None:
    terminal = host.open(control)
    terminal.write(b"last words\n")
    terminal.end()
    wait_until(lambda: not show(control)["running"], "the end of the run")
    wait_until(lambda: set(host.manager.store) == {"listen-banking", "ring-banking"}, "two left")
    host.kill()
    again = host.start()
    assert show(again)["generation"] == "g1"
    assert show(again)["running"] is False
    assert read_history(host) == b"last words\n"


def test_run_that_ended_while_consoled_was_dead(host: ConsoleHost, control: Control) -> None:
    terminal = host.open(control)
    wait_until(lambda: "master-banking" in host.manager.store, "the stored terminal")
    host.kill()
    terminal.write(b"last words\n")
    terminal.end()
    again = host.start()
    wait_until(lambda: not show(again)["running"], "the end of the run")
    assert read_history(host) == b"last words\n"
    wait_until(lambda: "master-banking" not in host.manager.store, "the terminal is dropped")


@pytest.mark.parametrize("lost", ["listen", "master", "journal", "ring"])
def test_a_descriptor_lost_with_a_restart(host: ConsoleHost, control: Control, lost: str) -> None:
    terminal = host.open(control, journal=host.journal())
    terminal.write(b"before\n")
    host.attached().expect_output(b"before\n")
    wait_until(lambda: len(host.manager.store) == 4, "four stored descriptors")
    host.kill()
    for fd in host.manager.store.pop(f"{lost}-banking"):
        os.close(fd)
    again = host.start()
    state = show(again)
    assert state["listening"] is (lost != "listen")
    assert state["running"] is (lost != "master")
    if lost != "listen":
        assert read_history(host) == (b"" if lost == "ring" else b"before\n")
    host.listen(again)
    if lost != "master":
        terminal.write(b"after\n")
        wait_until(lambda: read_history(host).endswith(b"after\n"), "the live output")


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"name":"other","owner":1,"generation":null,"running":false}']
)
def test_a_broken_state_file_and_strange_descriptors(host: ConsoleHost, control: Control, text: str) -> None:
    terminal = host.open(control)
    wait_until(lambda: "master-banking" in host.manager.store, "the stored terminal")
    host.kill()
    (host.state / "banking.json").write_text(text)
    (host.state / "work.json.new").write_text("half")
    host.manager.store["master-unknown"] = [os.dup(terminal.slave)]
    again = host.start()
    listed = again.call("list")["vms"]
    assert [vm["running"] for vm in listed] in ([], [False])
    wait_until(lambda: not any("master" in name for name in host.manager.store), "terminals are dropped")
    assert not (host.state / "work.json.new").exists()
    host.listen(again)
    host.open(again, generation="g2").write(b"works\n")
    wait_until(lambda: read_history(host) == b"works\n", "the console works")
