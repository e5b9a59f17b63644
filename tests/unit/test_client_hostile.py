"""vm-run where something is wrong: a hostile guest, no connection, a wrong command line."""

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import vmsilo_wire as wire
from client_host import Agent, CommandSocket, Run, command_socket, end, frames_of, run_commands
from vmsilo_wire import payload


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[CommandSocket]:
    with command_socket(tmp_path, run_commands) as host:
        yield host


def speak(*frames: bytes, then_close: bool = True) -> Agent:
    def agent(sock: socket.socket) -> None:
        for kind, _data in frames_of(sock):
            if kind == wire.SPAWN:
                for frame in frames:
                    sock.sendall(frame)
                if then_close:
                    return

    return agent


STARTED = payload.encode_started(1)


@pytest.mark.parametrize(
    "frames",
    [
        [b"\xff" * 1000],
        [STARTED, struct.pack(">BI", wire.STDOUT, 0xFFFFFFFF)],
        [STARTED, struct.pack(">BI", wire.EXIT, 1 << 20)],
        [struct.pack(">BI", wire.SPAWN, 2) + b"{}"],
        [STARTED, wire.encode_frame(wire.EXIT, b"not json")],
        [STARTED, wire.encode_frame(wire.EXIT, b"[" * 60000)],
        [STARTED, wire.encode_frame(wire.EXIT, b'{"code":1e400}')],
        [STARTED, wire.encode_frame(wire.EXIT, b'{"code":-1}')],
        [STARTED, wire.encode_consumed(1000)],
        [wire.encode_frame(wire.ERROR, b'{"code":[],"message":{}}')],
    ],
)
def test_broken_protocol_is_one_line(run: Run, tmp_path: Path, frames: list[bytes]) -> None:
    with command_socket(tmp_path, speak(*frames)):
        done = run("banking", "x")
    assert done.returncode == 125
    assert done.stderr.startswith(b"vm-run: the guest broke the protocol")
    assert done.stderr.count(b"\n") == 1


def test_connection_lost_half_way(run: Run, tmp_path: Path) -> None:
    with command_socket(tmp_path, speak(STARTED, wire.encode_frame(wire.STDOUT, b"half"))):
        done = run("banking", "x")
    assert (done.returncode, done.stdout) == (125, b"half")
    assert done.stderr == b"vm-run: the connection to the guest was lost\n"


def test_output_before_the_exit_is_not_lost(run: Run, tmp_path: Path) -> None:
    data = [wire.encode_frame(wire.STDOUT, bytes(wire.DATA_MAX))] * 8
    with command_socket(tmp_path, speak(STARTED, *data, payload.encode_exit(3))):
        done = run("banking", "x")
    assert (done.returncode, len(done.stdout)) == (3, 8 * wire.DATA_MAX)


def test_bytes_one_at_a_time(run: Run, tmp_path: Path) -> None:
    stream = STARTED + wire.encode_frame(wire.STDOUT, b"slow") + wire.encode_frame(wire.STDERR, b"")
    pieces = [bytes([b]) for b in stream + payload.encode_exit(4)]
    with command_socket(tmp_path, speak(*pieces)):
        done = run("banking", "x")
    assert (done.returncode, done.stdout) == (4, b"slow")


def test_escapes_in_an_error_are_not_shown(run: Run, tmp_path: Path) -> None:
    error = payload.encode_error("failed", "bad\x1b]0;owned\x07\nvm-run: forged\u202e line")
    with command_socket(tmp_path, speak(error)):
        done = run("banking", "x")
    assert done.returncode == 125
    assert done.stderr.count(b"\n") == 1
    assert b"\x1b" not in done.stderr
    assert "\u202e".encode() not in done.stderr


def test_third_interrupt_leaves(run: Run, tmp_path: Path) -> None:
    with command_socket(
        tmp_path, speak(STARTED, wire.encode_frame(wire.STDOUT, b"ready\n"), then_close=False)
    ):
        process = run.start("banking", "x")
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert end(process)[0] == 130


def test_stdin_keeps_to_the_window(run: Run, tmp_path: Path) -> None:
    taken = 0

    def agent(sock: socket.socket) -> None:
        nonlocal taken
        for kind, data in frames_of(sock):
            if kind == wire.SPAWN:
                sock.sendall(STARTED)
            elif kind == wire.STDIN:
                taken += len(data)
            elif kind == wire.SIGNAL:
                sock.sendall(payload.encode_exit(0))
                return

    with command_socket(tmp_path, agent):
        process = run.start("banking", "x")
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        sent = 0
        while select.select([], [process.stdin], [], 0.5)[1]:
            sent += os.write(process.stdin.fileno(), bytes(65536))
        assert taken == wire.STDIN_WINDOW < sent
        process.send_signal(signal.SIGTERM)
        assert end(process)[0] == 0


# No connection


def test_bad_names_touch_nothing(run: Run, tmp_path: Path) -> None:
    with command_socket(tmp_path, run_commands, name="evil"):
        for name in ("../run/evil", "Evil", "e vil", "", "1vil", "a" * 32, "evil\n", "é", "\x1b[31m", "-"):
            done = run("--", name, "true") if name.startswith("-") else run(name, "true")
            assert done.returncode == 125, name
            assert b"is not a VM name" in done.stderr
            assert b"\x1b" not in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["banking"],
        ["banking", "--"],
        ["--frobnicate", "banking", "x"],
        ["--env", "banking", "x"],
        ["--env", "1=2", "banking", "x"],
        ["--timeout", "0", "banking", "x"],
        ["--timeout", "1e3", "banking", "x"],
        ["--escapes=some", "banking", "x"],
        ["--cwd"],
    ],
)
def test_wrong_command_lines(run: Run, args: list[str]) -> None:
    done = run(*args)
    assert done.returncode == 125
    assert done.stderr.startswith(b"vm-run: ")
    assert b"\nhint: " in done.stderr


@pytest.mark.usefixtures("host")
def test_unknown_name_is_offered_a_close_one(run: Run) -> None:
    done = run("bankign", "x")
    assert (done.returncode, done.stderr) == (
        125,
        b"vm-run: no VM 'bankign'\nhint: did you mean 'banking'?\n",
    )


def test_nothing_runs(run: Run) -> None:
    done = run("banking", "x")
    assert done.returncode == 125
    assert b"hint: systemctl status vmsilod" in done.stderr


def test_too_long_a_command_line(run: Run) -> None:
    done = run("banking", *["\x01" * 100000] * 2)
    assert (done.returncode, done.stderr.count(b"\n")) == (125, 1)


@pytest.mark.parametrize(
    ("packet", "text"),
    [
        (
            {"error": {"code": "busy", "message": "too many\x1b[2J", "hint": "wait"}},
            b"too many [2J\nhint: wait\n",
        ),
        ({"error": "x"}, b"refused"),
        ({"ok": True}, b"without a connection"),
        (b"garbage", b"not one"),
    ],
)
def test_relay_refuses(run: Run, tmp_path: Path, packet: object, text: bytes) -> None:
    with command_socket(tmp_path, None, packets=(packet,)):
        done = run("banking", "x")
    assert done.returncode == 125
    assert text in done.stderr
    assert b"\x1b" not in done.stderr


def test_cold_start_says_nothing_on_a_pipe(run: Run, tmp_path: Path) -> None:
    booting = {"state": "booting", "text": "waiting for the guest"}
    with command_socket(tmp_path, run_commands, packets=(booting, booting)) as host:
        host.pause = 0.4
        done = run("banking", "true")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_warm_path_loads_few_modules() -> None:
    code = "import sys; sys.path[:0] = sys.argv[1:]; import vmsilo.programs, vmsilo.run; print(*sys.modules)"
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(root / "client"), str(root / "guest")],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    heavy = {
        "re",
        "enum",
        "json",
        "socket",
        "signal",
        "typing",
        "argparse",
        "subprocess",
        "dataclasses",
        "jeepney",
    }
    assert not loaded & heavy
