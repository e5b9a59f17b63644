"""vm-run on a terminal: raw mode and the way back, size, escape, filter, the line of a cold start."""

import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import vmsilo_wire as wire
from client_host import CommandSocket, command_socket, frames_of, run_commands, write_program
from client_host_terminal import Terminal
from vmsilo.terminal import LeaveEscape
from vmsilo_wire import payload


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    return write_program(tmp_path, "vm-run")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[CommandSocket]:
    with command_socket(tmp_path, run_commands) as host:
        yield host


@pytest.mark.usefixtures("host")
def test_size_and_status(argv: list[str]) -> None:
    with Terminal([*argv, "banking", "sh", "-c", "stty size; echo $TERM; exit 6"]) as terminal:
        assert terminal.wait() == 6
        assert terminal.screen == b"24 80\r\ndumb\r\n"
        assert terminal.current_modes() == terminal.modes


@pytest.mark.usefixtures("host")
def test_window_size_follows(argv: list[str]) -> None:
    script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.02; done"
    with Terminal([*argv, "banking", "sh", "-c", script]) as terminal:
        terminal.read_until(b"ready")
        terminal.resize(50, 132)
        terminal.read_until(b"50 132")
        terminal.type(b"\x03")
        assert terminal.wait() == 130


@pytest.mark.usefixtures("host")
def test_interrupt_travels_as_a_byte(argv: list[str]) -> None:
    script = "trap 'echo guest INT; exit 3' INT; echo ready; while :; do sleep 0.02; done"
    with Terminal([*argv, "banking", "sh", "-c", script]) as terminal:
        terminal.read_until(b"ready")
        terminal.type(b"\x03")
        assert terminal.wait() == 3
        assert b"guest INT" in terminal.screen
        assert terminal.current_modes() == terminal.modes


def mute(sock: socket.socket) -> None:
    """Starts the command, then neither reads nor answers, and swears so on the screen."""
    sock.recv(1 << 20)
    sock.sendall(payload.encode_started(1) + wire.encode_frame(wire.STDOUT, b"\x1b[31mmine"))
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    poll.poll()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_leave_and_restore(argv: list[str], tmp_path: Path, number: int) -> None:
    with command_socket(tmp_path, mute), Terminal([*argv, "banking", "x"]) as terminal:
        terminal.read_until(b"mine")
        terminal.wait_raw()
        terminal.process.send_signal(number)
        assert terminal.wait() == 128 + number
        assert terminal.current_modes() == terminal.modes


def test_escape_leaves_a_mute_guest(argv: list[str], tmp_path: Path) -> None:
    with command_socket(tmp_path, mute), Terminal([*argv, "banking", "x"]) as terminal:
        terminal.read_until(b"mine")
        for _ in range(40):
            terminal.type(b"k" * 1000)
            time.sleep(0.002)
        terminal.type(b"\r~.")
        assert terminal.wait() == 129
        assert terminal.current_modes() == terminal.modes


def test_escape_leaves_before_the_start(argv: list[str], tmp_path: Path) -> None:
    def silent(sock: socket.socket) -> None:
        for _frame in frames_of(sock):
            pass

    with command_socket(tmp_path, silent), Terminal([*argv, "banking", "x"]) as terminal:
        terminal.wait_raw()
        terminal.type(b"~.")
        assert terminal.wait() == 129
        assert terminal.current_modes() == terminal.modes


def test_broken_protocol_restores(argv: list[str], tmp_path: Path) -> None:
    def garbage(sock: socket.socket) -> None:
        sock.recv(1 << 20)
        sock.sendall(payload.encode_started(1) + b"\xff" * 100)
        sock.recv(1)

    with command_socket(tmp_path, garbage), Terminal([*argv, "banking", "x"]) as terminal:
        assert terminal.wait() == 125
        assert b"broke the protocol" in terminal.screen
        assert terminal.current_modes() == terminal.modes


HOSTILE = r"printf 'a\033]0;title\007b\033[2J\033[31mc\033[6n\342\200\256d\n\302\233'"


@pytest.mark.usefixtures("host")
def test_output_is_filtered(argv: list[str]) -> None:
    with Terminal([*argv, "banking", "sh", "-c", HOSTILE]) as terminal:
        assert terminal.wait() == 0
        assert terminal.screen == b"ab\x1b[31mcd\r\n\x1b[0m"


@pytest.mark.usefixtures("host")
def test_all_escapes_on_request(argv: list[str]) -> None:
    with Terminal([*argv, "--escapes", "all", "banking", "sh", "-c", f"{HOSTILE}; echo $TERM"]) as terminal:
        assert terminal.wait() == 0
        assert b"\x1b]0;title\x07b\x1b[2J" in terminal.screen
        assert terminal.screen.endswith(b"xterm-256color\r\n")


@pytest.mark.usefixtures("host")
def test_input_from_a_pipe_has_no_pty_but_the_filter(argv: list[str]) -> None:
    read_fd, write_fd = os.pipe()
    os.write(write_fd, b"from the pipe\n")
    os.close(write_fd)
    script = f"cat; test -t 1 || echo no pty; echo >&2 $TERM; {HOSTILE} >&2"
    with Terminal([*argv, "banking", "sh", "-c", script], stdin=read_fd) as terminal:
        os.close(read_fd)
        assert terminal.wait() == 0
    assert b"from the pipe\r\n" in terminal.screen
    assert b"no pty\r\n" in terminal.screen
    assert b"\x1b]" not in terminal.screen
    assert b"\x1b[2J" not in terminal.screen
    assert b"xterm" not in terminal.screen


def test_stop_and_continue_keep_the_modes(argv: list[str], tmp_path: Path) -> None:
    shell = ["sh", "-mc", '"$@"; echo stopped; fg; echo over $?', "sh", *argv, "banking", "x"]
    with command_socket(tmp_path, mute), Terminal(shell) as terminal:
        terminal.read_until(b"mine")
        terminal.wait_raw()
        pid = terminal.process.pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTSTP)
        terminal.read_until(b"stopped")
        terminal.wait_raw()
        terminal.type(b"~.")
        terminal.read_until(b"over 129")
        assert terminal.wait() == 0
        assert terminal.current_modes() == terminal.modes


def test_cold_start_shows_one_line_and_erases_it(argv: list[str], tmp_path: Path) -> None:
    booting = {"state": "booting", "text": "waiting\x1b]0;x\x07 for the guest " + "long " * 50}
    with command_socket(tmp_path, run_commands, packets=(booting,)) as host:
        host.pause = 0.8
        with Terminal([*argv, "banking", "true"]) as terminal:
            terminal.read_until(b"starting banking: waiting")
            assert terminal.wait() == 0
    assert b"\n" not in terminal.screen
    assert b"\x1b]" not in terminal.screen
    assert terminal.screen.endswith(b"\r\x1b[K")
    for line in terminal.screen.replace(b"\x1b[K", b"").split(b"\r"):
        assert len(line) < 80


def test_interrupt_of_a_cold_start(argv: list[str], tmp_path: Path) -> None:
    with command_socket(tmp_path, run_commands, packets=({"state": "booting", "text": "b"},)) as host:
        host.pause = 2
        with Terminal([*argv, "banking", "true"]) as terminal:
            terminal.read_until(b"starting banking")
            terminal.type(b"\x03")
            assert terminal.wait() == 130
            assert b"Traceback" not in terminal.screen


@pytest.mark.parametrize(
    ("keys", "sent", "left"),
    [
        ([b"~."], b"", True),
        ([b"ls\r", b"~", b"."], b"ls\r", True),
        ([b"ls ~."], b"ls ~.", False),
        ([b"\r~~."], b"\r~.", False),
        ([b"\r~x"], b"\r~x", False),
        ([b"\r~", b"\r~."], b"\r~\r", True),
        ([b"a\n~.rest"], b"a\n", True),
        ([b""], b"", False),
    ],
)
def test_leave_escape(keys: list[bytes], sent: bytes, left: bool) -> None:  # noqa: FBT001
    escape = LeaveEscape()
    results = [escape.feed(piece) for piece in keys]
    assert b"".join(data for data, _ in results) == sent
    assert results[-1][1] is left
