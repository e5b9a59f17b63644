"""The agent sets the size of the guest's console; here that is a terminal of the test's own."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from typing import TYPE_CHECKING

import pytest
import vmsilo_wire as wire
from agent_client import AgentProcess, Client, connect
from vmsilo_agent.console import find_console
from vmsilo_wire.payload import parse_error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def tty() -> Iterator[int]:
    master, slave = os.openpty()
    yield slave
    os.close(master)
    os.close(slave)


@pytest.fixture(scope="module")
def agent(tty: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    process = AgentProcess(tmp_path_factory.mktemp("agent"), "--console", os.ttyname(tty))
    yield process
    process.stop()


def size(tty: int) -> tuple[int, ...]:
    return struct.unpack("HHHH", fcntl.ioctl(tty, termios.TIOCGWINSZ, bytes(8)))[:2]


def greet(agent: AgentProcess, role: str) -> Client:
    client = connect(agent.socket)
    client.hello(role)
    return client


@pytest.mark.parametrize("role", ["user", "root"])
def test_sizes_one_after_the_other(agent: AgentProcess, tty: int, role: str) -> None:
    with greet(agent, role) as client:
        for rows, cols in ((50, 132), (1, 1), (1000, 1000)):
            client.sock.sendall(wire.encode_console_size(rows, cols))
            assert client.receive() == (wire.PONG, struct.pack(">HH", rows, cols))
            assert size(tty) == (rows, cols)
        client.spawn("echo", "after")
        client.started()
        assert client.collect(None).stdout == b"after\n"


@pytest.mark.parametrize("payload", [b"\0\0\0\x50", b"\0\x18\0\0", b"\x03\xe9\0\x50", b"\xff\xff\xff\xff"])
def test_a_size_out_of_bounds_ends_the_connection(agent: AgentProcess, tty: int, payload: bytes) -> None:
    before = size(tty)
    with greet(agent, "user") as client:
        client.send(wire.CONSOLE_SIZE, payload)
        frame = client.receive()
        assert frame is not None
        assert parse_error(frame[1])[0] == "bad-request"
        assert client.receive() is None
    assert size(tty) == before


def test_not_for_the_control_role_and_not_beside_a_command(agent: AgentProcess, tty: int) -> None:
    before = size(tty)
    for role in ("control", "user"):
        with greet(agent, role) as client:
            if role == "user":
                client.spawn("sleep", "60")
                client.started()
            client.sock.sendall(wire.encode_console_size(33, 44))
            frame = client.receive()
            assert frame is not None
            assert parse_error(frame[1])[0] == "bad-request"
    assert size(tty) == before


def test_a_guest_without_a_console_says_so_and_goes_on(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path, "--console", "/dev/null")
    try:
        with greet(agent, "user") as client:
            client.sock.sendall(wire.encode_console_size(33, 44))
            frame = client.receive()
            assert frame is not None
            assert parse_error(frame[1])[0] == "failed"
            client.spawn("echo", "after")
            client.started()
            assert client.collect(None).stdout == b"after\n"
    finally:
        agent.stop()


def test_the_last_console_that_is_a_terminal_counts(tty: int, tmp_path: Path) -> None:
    for name in ("ttyS0", "ttyS1"):
        (tmp_path / name).symlink_to(os.ttyname(tty))
    (tmp_path / "tty0").write_text("no terminal")
    folder = str(tmp_path)
    assert find_console("ro console=ttyS0 console=ttyS1,115200n8 quiet", folder) == f"{folder}/ttyS1"
    assert (
        find_console("console=ttyS0 console=tty0 console=ttyS9 console= console", folder)
        == f"{folder}/ttyS0"
    )
    for hostile in ("", "console=../ttyS0", "console=/dev/ttyS0", "xconsole=ttyS0", "console=ttynull"):
        with pytest.raises(OSError, match="No such device"):
            find_console(hostile, folder)
