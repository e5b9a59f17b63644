"""vm-shell beside the console: its command line, commands in the guest, and the console's size."""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
import vmsilo_wire as wire
from client_host import ROOT, command_socket, frames_of, run_commands, site_dirs, write_program
from client_host_console import ConsoleSocket, console_socket
from client_host_terminal import Terminal
from vmsilo_wire import payload

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    return write_program(tmp_path, "vm-shell", interpreter_path=site_dirs())


@pytest.fixture
def console(tmp_path: Path) -> Iterator[ConsoleSocket]:
    with console_socket(tmp_path) as console:
        yield console


def run(argv: list[str], *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*argv, *args], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ((), "no VM named"),
        (("a", "b"), "one VM at a time"),
        (("../x",), "is not a VM name"),
        (("--read-only", "--take", "a"), "--read-only and --take exclude each other"),
        (("--log", "--take", "a"), "--take has no meaning with --log"),
        (("--exec", "--ssh", "a"), "--exec and --ssh exclude each other"),
        (("--exec", "--start", "a"), "--start has no meaning with --exec"),
        (("--root", "a"), "--root needs --exec or --ssh"),
        (("--log", "--root", "a"), "--root needs --exec or --ssh"),
        (("--exec",), "no VM named"),
        (("--ssh", "--escapes", "all", "a"), "--escapes has no meaning with --ssh"),
        (("a", "--exec"), "unknown option '--exec'"),
        (("--escapes", "some", "a"), "--escapes takes 'colour' or 'all'"),
    ],
)
def test_wrong_command_lines(argv: list[str], args: tuple[str, ...], complaint: str) -> None:
    done = run(argv, *args)
    assert done.returncode == 2
    assert complaint in done.stderr


def test_help(argv: list[str]) -> None:
    done = run(argv, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: vm-shell ")


def test_exec_runs_a_command_with_a_terminal(argv: list[str], tmp_path: Path) -> None:
    with (
        command_socket(tmp_path, run_commands),
        Terminal([*argv, "--exec", "banking", "stty", "size"]) as terminal,
    ):
        assert terminal.wait() == 0
        assert terminal.screen == b"24 80\r\n"


def test_exec_without_a_command_is_the_users_shell(argv: list[str], tmp_path: Path) -> None:
    seen: list[payload.Spawn] = []

    def serve(sock: socket.socket) -> None:
        frames = frames_of(sock)
        seen.append(payload.parse_spawn(next(frames)[1]))
        sock.sendall(payload.encode_started(1) + payload.encode_exit(7))
        sock.shutdown(socket.SHUT_WR)
        list(frames)

    with command_socket(tmp_path, serve), Terminal([*argv, "--exec", "banking"]) as terminal:
        assert terminal.wait() == 7
    (spawn,) = seen
    assert spawn.pty == (24, 80)
    done = subprocess.run(
        spawn.argv, env={"SHELL": "/bin/echo"}, capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "-l\n"


class Agent:
    """A guest's agent that is asked for the console's size only."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.connections = 0
        self.answer = wire.PONG

    def __call__(self, sock: socket.socket) -> None:
        self.connections += 1
        for kind, data in frames_of(sock):
            assert kind == wire.CONSOLE_SIZE
            self.sizes.append(wire.parse_console_size(data))
            if self.answer == wire.ERROR:
                sock.sendall(payload.encode_error("bad-request", "frame type 8 not allowed"))
                sock.shutdown(socket.SHUT_RDWR)
                return
            sock.sendall(wire.encode_frame(wire.PONG, data))

    def wait_for(self, *sizes: tuple[int, int]) -> None:
        deadline = time.monotonic() + 20
        while self.sizes != [*sizes]:
            assert time.monotonic() < deadline, self.sizes
            time.sleep(0.01)


def test_the_guest_hears_the_windows_size(argv: list[str], tmp_path: Path, console: ConsoleSocket) -> None:
    agent = Agent()
    boot = {"state": "booting", "text": "starting"}
    with (
        command_socket(tmp_path, agent, packets=(boot, boot)) as host,
        Terminal([*argv, "banking"]) as terminal,
    ):
        client = console.next()
        client.welcome()
        agent.wait_for((24, 80))
        terminal.resize(50, 132)
        agent.wait_for((24, 80), (50, 132))
        client.send("W", {"writer": False, "writer_pid": 1})
        terminal.read_until(b"read-only from here")
        terminal.resize(10, 10)
        client.send("W", {"writer": True, "writer_pid": 2})
        agent.wait_for((24, 80), (50, 132), (10, 10))
        terminal.type(b"\x1d")
        assert terminal.wait() == 0
        assert [r["op"] for r in host.requests] == ["connect"]
    assert agent.connections == 1


def test_readers_have_no_say_in_the_size(argv: list[str], tmp_path: Path, console: ConsoleSocket) -> None:
    agent = Agent()
    with command_socket(tmp_path, agent) as host, Terminal([*argv, "--read-only", "banking"]) as terminal:
        console.next().welcome(writer=False)
        terminal.wait_raw()
        terminal.resize(50, 132)
        terminal.type(b"\x1d")
        assert terminal.wait() == 0
        assert not host.requests


def test_an_agent_that_cannot_set_sizes_is_left_alone(
    argv: list[str], tmp_path: Path, console: ConsoleSocket
) -> None:
    agent = Agent()
    agent.answer = wire.ERROR
    with command_socket(tmp_path, agent), Terminal([*argv, "banking"]) as terminal:
        client = console.next()
        client.welcome()
        agent.wait_for((24, 80))
        terminal.resize(50, 132)
        client.send("O", b"alive")
        terminal.read_until(b"alive")
        terminal.type(b"\x1d")
        assert terminal.wait() == 0
    assert agent.sizes == [(24, 80)]


def test_a_hostile_agent_does_not_disturb_the_console(
    argv: list[str], tmp_path: Path, console: ConsoleSocket
) -> None:
    def serve(sock: socket.socket) -> None:
        sock.sendall(struct.pack(">BI", wire.PONG, 0xFFFFFFFF) + bytes(100_000))
        list(frames_of(sock))

    with command_socket(tmp_path, serve), Terminal([*argv, "banking"]) as terminal:
        client = console.next()
        client.welcome()
        time.sleep(0.3)
        client.send("O", b"alive")
        terminal.read_until(b"alive")
        terminal.type(b"\x1d")
        assert terminal.wait() == 0
