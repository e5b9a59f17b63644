"""vm-run against the real guest agent, which runs on this machine as the user of the tests."""

import hashlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_client import SECRET, AgentProcess
from client_host import WAIT, command_socket, write_program
from client_host_terminal import Terminal
from vmsilo_wire import payload


@pytest.fixture
def argv(tmp_path: Path) -> Iterator[list[str]]:
    agent = AgentProcess(tmp_path)

    def dial() -> socket.socket:
        channel = socket.socket(socket.AF_UNIX)
        channel.connect(str(agent.socket))
        channel.sendall(payload.encode_hello("user", SECRET))
        return channel

    try:
        with command_socket(tmp_path, None) as host:
            host.dial = dial
            yield [*write_program(tmp_path, "vm-run"), "banking"]
    finally:
        agent.stop()


def test_bytes_status_and_outputs(argv: list[str]) -> None:
    data = os.urandom(1 << 20) * 20
    done = subprocess.run(
        [*argv, "sh", "-c", "cat; echo err >&2; exit 7"],
        input=data,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (7, b"err\n")
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize(
    ("command", "status"),
    [(["no-such-command"], 127), (["/dev/null"], 126), (["sh", "-c", "kill -KILL $$"], 137), (["true"], 0)],
)
def test_status(argv: list[str], command: list[str], status: int) -> None:
    assert (
        subprocess.run([*argv, *command], capture_output=True, timeout=60, check=False).returncode == status
    )


def test_signal_reaches_the_command(argv: list[str]) -> None:
    script = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.02; done"
    with subprocess.Popen([*argv, "sh", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 3


def test_terminal(argv: list[str]) -> None:
    script = "trap 'stty size' WINCH; stty size; while :; do sleep 0.02; done"
    with Terminal([*argv, "sh", "-c", script]) as terminal:
        terminal.read_until(b"24 80")
        terminal.resize(40, 100)
        terminal.read_until(b"40 100")
        terminal.type(b"\x03")
        assert terminal.wait() == 130
        assert terminal.current_modes() == terminal.modes
