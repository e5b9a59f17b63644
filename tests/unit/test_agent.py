"""The real agent, over a Unix socket, with real commands."""

from __future__ import annotations

import hashlib
import os
import pwd
import time
from typing import TYPE_CHECKING

import pytest
import vmsilo_wire as wire
from agent_client import AgentProcess, is_alive, read_state, wait_for
from vmsilo_wire.payload import parse_exit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOME = pwd.getpwuid(os.getuid()).pw_dir


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    process = AgentProcess(tmp_path_factory.mktemp("agent"))
    yield process
    process.stop()


@pytest.fixture
def agent(shared: AgentProcess) -> Iterator[AgentProcess]:
    yield shared
    shared.assert_idle()


def test_outputs_are_kept_apart(agent: AgentProcess) -> None:
    assert agent.run("sh", "-c", "echo out; echo err >&2; exit 3") == (b"out\n", b"err\n", 3, None)


def test_ten_megabytes_of_any_byte_go_both_ways(agent: AgentProcess) -> None:
    data = hashlib.shake_256(b"seed").digest(10 * 1024 * 1024)
    result = agent.run("cat", stdin=data)
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()
    assert result[1:] == (b"", 0, None)


def test_death_by_signal_is_told(agent: AgentProcess) -> None:
    assert agent.run("sh", "-c", "kill -9 $$").exit == -9


@pytest.mark.parametrize("number", [1, 2, 10, 15])
def test_signals_arrive_while_data_is_stuck(agent: AgentProcess, number: int) -> None:
    with agent.connect() as client:
        client.spawn("sleep", "60")
        client.started()
        for _ in range(wire.STDIN_WINDOW // wire.DATA_MAX):
            client.send(wire.STDIN, bytes(wire.DATA_MAX))
        client.sock.sendall(wire.encode_signal(number))
        assert client.collect(None).exit == -number


def test_stop_and_continue(agent: AgentProcess) -> None:
    with agent.connect() as client:
        client.spawn("sh", "-c", "trap 'echo again; exit 4' CONT; echo ready; while :; do read x; done")
        pid = client.started()
        assert client.expect(wire.STDOUT) == b"ready\n"
        client.sock.sendall(wire.encode_signal(20))
        wait_for(lambda: read_state(pid) == "T")
        client.sock.sendall(wire.encode_signal(18))
        assert client.collect(None)[:3] == (b"again\n", b"", 4)


def test_environment_and_directory(agent: AgentProcess, tmp_path: Path) -> None:
    with agent.connect() as client:
        result = client.run(
            "sh", "-c", 'pwd; echo "$HOME|$A|$LD_LIBRARY_PATH"', cwd=str(tmp_path), env={"A": "1 2"}
        )
    assert result.stdout.decode() == f"{tmp_path}\n{HOME}|1 2|\n"
    home = os.path.realpath(HOME) if os.path.isdir(HOME) else "/"  # noqa: PTH112 - a path as the shell says it
    assert agent.run("pwd").stdout.decode().strip() == home
    names = {line.partition(b"=")[0] for line in agent.run("env").stdout.splitlines()}
    assert names >= {b"HOME", b"USER", b"LOGNAME", b"SHELL", b"PATH", b"LANG"}


# SIGCANCEL and SIGSETXID (32, 33) are glibc's own: who was started with them blocked cannot unblock them.
GLIBC_SIGNALS = 0b11 << 31


def test_command_has_nothing_of_the_agents(agent: AgentProcess) -> None:
    code = "import os, signal; print(os.listdir('/proc/self/fd'), os.getpid() == os.getsid(0), end='')"
    result = agent.run("python3", "-I", "-S", "-c", code)
    assert result.stdout == b"['0', '1', '2', '3'] True"
    masks = agent.run("grep", "-E", "^Sig(Ign|Blk)", "/proc/self/status").stdout.split()
    assert [int(mask, 16) & ~GLIBC_SIGNALS for mask in masks[1::2]] == [0, 0]


@pytest.mark.parametrize(
    ("argv", "cwd", "code"),
    [
        (("no-such-command",), None, "not-found"),
        (("/no/such/command",), None, "not-found"),
        (("/etc/passwd",), None, "not-executable"),
        (("/",), None, "not-executable"),
        (("true",), "/no/such/directory", "failed"),
        (("true", "x" * 200_000), None, "failed"),
    ],
)
def test_what_cannot_run_is_told_precisely(
    agent: AgentProcess, argv: tuple[str, ...], cwd: str | None, code: str
) -> None:
    with agent.connect() as client:
        result = client.run(*argv, cwd=cwd)
    assert result.error is not None
    assert result.error[0] == code
    assert result.exit is None


def test_missing_interpreter_is_not_executable(agent: AgentProcess, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    error = agent.run("script", env={"PATH": str(tmp_path)}).error
    assert error is not None
    assert error[0] == "not-executable"


def test_command_that_closes_its_input_gets_no_more(agent: AgentProcess) -> None:
    result = agent.run("sh", "-c", "exec <&-; sleep 0.1; echo done", stdin=bytes(5 * 1024 * 1024))
    assert result[:3] == (b"done\n", b"", 0)


def test_slow_reader_gets_everything(agent: AgentProcess) -> None:
    with agent.connect() as client:
        client.spawn("head", "-c", "20000000", "/dev/zero")
        client.started()
        time.sleep(0.3)  # longer than the agent waits for quiet pipes after an exit
        result = client.collect(None)
    assert (len(result.stdout), result.exit) == (20_000_000, 0)


def test_terminal_size_resize_and_control_c(agent: AgentProcess) -> None:
    with agent.connect() as client:
        traps = "trap 'stty size; exit 5' WINCH; trap 'echo int' INT"
        script = f"{traps}; stty size; tty >/dev/tty; while :; do read x; done"
        client.spawn("sh", "-c", script, pty=(30, 100))
        client.started()
        text = b""
        while b"/dev/pts" not in text:
            text += client.expect(wire.STDOUT)
        assert text.startswith(b"30 100\r\n")
        client.send(wire.STDIN, b"\x03")
        while b"int" not in text:
            text += client.expect(wire.STDOUT)
        client.sock.sendall(wire.encode_resize(41, 77))
        result = client.collect(None)
    assert b"41 77\r\n" in result.stdout
    assert result.exit == 5


def test_end_of_input_on_a_terminal(agent: AgentProcess) -> None:
    with agent.connect() as client:
        result = client.run("sh", "-c", "stty -echo; cat", stdin=b"line\n", pty=(24, 80))
    assert b"line\r\n" in result.stdout
    assert result.exit == 0
    assert client.unacknowledged == 0


def test_background_child_does_not_hold_the_exit(agent: AgentProcess) -> None:
    before = time.monotonic()
    with agent.connect() as client:
        result = client.run("sh", "-c", "sleep 60 & echo $!")
    assert result.exit == 0
    assert time.monotonic() - before < 5
    pid = int(result.stdout)
    assert is_alive(pid)  # as it would on any login
    os.kill(pid, 9)


def test_client_death_ends_what_the_command_left(agent: AgentProcess) -> None:
    escape = "setsid" if agent.cgroup is not None else ""
    with agent.connect() as client:
        client.spawn("sh", "-c", f"{escape} sleep 60 & echo $!; trap '' HUP; while :; do read x; done")
        main = client.started()
        grandchild = int(client.expect(wire.STDOUT))
        assert is_alive(grandchild)
    wait_for(lambda: not is_alive(grandchild) and not is_alive(main))  # HUP is ignored, KILL is not


def test_detached_command_outlives_the_connection(agent: AgentProcess, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    with agent.connect() as client:
        client.spawn("sh", "-c", f"read x; sleep 0.3; echo $? > {flag}", detach=True)
        pid = client.started()
        assert client.receive() is None
    assert is_alive(pid)
    wait_for(lambda: flag.exists() and not is_alive(pid))


def test_two_hundred_commands_at_once(agent: AgentProcess) -> None:
    clients = [agent.connect() for _ in range(200)]
    for number, client in enumerate(clients):
        client.spawn("sh", "-c", f"read x; echo {number} $x; exit {number}")
    for client in clients:
        client.started()
    for number, client in enumerate(clients):
        result = client.collect(b"word\n")
        assert (result.stdout, result.exit) == (f"{number} word\n".encode(), number)
        client.close()


def test_exit_status_of_a_command_killed_at_once(agent: AgentProcess) -> None:
    with agent.connect() as client:
        client.spawn("sh", "-c", "exit 0")
        client.started()
        assert parse_exit(client.expect(wire.EXIT)) == 0
        assert client.receive() is None
