"""vm-run as a process, against a stand-in for the host, without a terminal."""

import hashlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import vmsilo_wire as wire
from client_host import WAIT, CommandSocket, Run, command_socket, end, frames_of, run_commands
from vmsilo_wire import payload


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[CommandSocket]:
    with command_socket(tmp_path, run_commands) as host:
        yield host


@pytest.mark.usefixtures("host")
def test_outputs_stay_apart_and_binary(run: Run) -> None:
    done = run("banking", "sh", "-c", r"printf 'out\000\033]0;x\007\377'; printf 'err\200' >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\0\x1b]0;x\x07\xff", b"err\x80")


def test_request_and_spawn(run: Run, host: CommandSocket) -> None:
    done = run("--timeout=9", "banking", "--", "printenv", "LC_TIME", "HOME", env={"LC_TIME": "de_AT"})
    assert (done.returncode, done.stdout) == (1, b"de_AT\n")
    assert host.requests == [{"v": 1, "op": "connect", "wait": 9}]


@pytest.mark.usefixtures("host")
def test_arguments_environment_directory(run: Run, tmp_path: Path) -> None:
    script = 'printf "%s|" "$@" "$KEY" "$(pwd)"'
    odd = os.fsdecode(b"\xff\xfe")
    done = run(
        "--cwd",
        str(tmp_path),
        "--env",
        "KEY=a=b",
        "banking",
        "sh",
        "-c",
        script,
        "x",
        "--env",
        "",
        "ü\n",
        odd,
    )
    assert done.stdout == b"--env||" + "ü\n|".encode() + b"\xff\xfe|a=b|" + os.fsencode(tmp_path) + b"|"


@pytest.mark.usefixtures("host")
def test_fifty_mib_through_cat(run: Run) -> None:
    data = os.urandom(1 << 20) * 50
    done = run("banking", "cat", stdin=data)
    assert done.returncode == 0
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 255", 255), ("kill -TERM $$", 143), ("kill -KILL $$", 137)]
)
def test_exit_status(run: Run, script: str, status: int) -> None:
    assert run("banking", "sh", "-c", script).returncode == status


@pytest.mark.usefixtures("host")
def test_not_found_and_not_executable(run: Run, tmp_path: Path) -> None:
    done = run("banking", "no-such-command")
    assert (done.returncode, done.stderr) == (127, b"vm-run: no-such-command: not found\n")
    assert run("banking", str(tmp_path / "run")).returncode == 126


@pytest.mark.usefixtures("host")
def test_detach_returns_before_the_command(run: Run, tmp_path: Path) -> None:
    began = time.monotonic()
    assert run("--detach", "banking", "sh", "-c", f"sleep 1; touch {tmp_path}/done").returncode == 0
    assert not (tmp_path / "done").exists()
    assert time.monotonic() - began < 1


@pytest.mark.usefixtures("host")
def test_slow_reader_gets_everything(run: Run) -> None:
    process = run.start("banking", "sh", "-c", "head -c 3000000 /dev/zero; echo end")
    assert process.stdout is not None
    got = b""
    for _ in range(20):
        time.sleep(0.02)
        got += os.read(process.stdout.fileno(), 10000)
    status, rest, _err = end(process)
    assert status == 0
    assert got + rest == bytes(3000000) + b"end\n"


def test_blocked_stdout_stops_neither_signals_nor_stdin(run: Run, tmp_path: Path) -> None:
    taken = 0
    signalled = threading.Event()
    flood = wire.encode_frame(wire.STDOUT, bytes(wire.DATA_MAX)) * 40

    def agent(sock: socket.socket) -> None:
        nonlocal taken
        for kind, data in frames_of(sock):
            if kind == wire.SPAWN:
                sock.sendall(payload.encode_started(1))
                writer = threading.Thread(target=sock.sendall, args=(flood,))
                writer.start()
            elif kind == wire.STDIN:
                taken += len(data)
            elif kind == wire.SIGNAL:
                signalled.set()
                writer.join(WAIT)
                sock.sendall(payload.encode_exit(9))
                return

    with command_socket(tmp_path, agent):
        process = run.start("banking", "x")
        assert process.stdin is not None
        process.stdin.write(bytes(500000))
        process.stdin.flush()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert signalled.wait(WAIT)
        status, out, _err = end(process)
    assert (status, taken, len(out)) == (9, 500000, 40 * wire.DATA_MAX)


@pytest.mark.usefixtures("host")
def test_closed_reader_ends_like_sigpipe(run: Run) -> None:
    process = run.start("banking", "yes")
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    process.stdout = None
    status, _out, err = end(process)
    assert (status, err) == (141, b"")


@pytest.mark.usefixtures("host")
def test_descriptors_of_the_caller_keep_their_mode(run: Run) -> None:
    read_fd, write_fd = os.pipe()
    process = run.start("banking", "sh", "-c", "echo ready; sleep 0.2", stdout=write_fd)
    assert os.read(read_fd, 100) == b"ready\n"
    assert os.get_blocking(write_fd)
    assert end(process)[0] == 0
    assert os.get_blocking(write_fd)
    os.close(read_fd)
    os.close(write_fd)


@pytest.mark.usefixtures("host")
def test_socket_and_file_as_stdout(run: Run, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        process = run.start("banking", "head", "-c", "2000000", "/dev/zero", stdout=theirs.fileno())
        theirs.close()
        total = 0
        while data := ours.recv(65536):
            total += len(data)
        assert (end(process)[0], total) == (0, 2000000)
    with (tmp_path / "file").open("ab") as file:
        assert end(run.start("banking", "head", "-c", "2000000", "/dev/zero", stdout=file.fileno()))[0] == 0
    assert (tmp_path / "file").stat().st_size == 2000000


@pytest.mark.usefixtures("host")
def test_full_disk_is_a_failure(run: Run) -> None:
    with Path("/dev/full").open("wb") as full:
        status, _out, err = end(run.start("banking", "echo", "x", stdout=full.fileno()))
    assert (status, err) == (125, b"vm-run: cannot write to standard output: No space left on device\n")


@pytest.mark.usefixtures("host")
def test_started_without_descriptors(run: Run) -> None:
    script = f"exec {' '.join(run.argv)} banking sh -c 'cat; exit 5' <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", script], check=False, timeout=WAIT).returncode == 5


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_the_command(run: Run, number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    script = f"trap 'echo got {name}; exit 3' {name}; echo ready; while :; do sleep 0.02; done"
    process = run.start("banking", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert end(process)[:2] == (3, f"got {name}\n".encode())


def test_stop_and_continue(run: Run, tmp_path: Path) -> None:
    seen: list[int] = []
    arrived = threading.Condition()

    def agent(sock: socket.socket) -> None:
        for kind, data in frames_of(sock):
            if kind == wire.SPAWN:
                sock.sendall(payload.encode_started(1) + wire.encode_frame(wire.STDOUT, b"ready\n"))
            elif kind == wire.SIGNAL:
                with arrived:
                    seen.append(data[0])
                    arrived.notify()
                if data[0] == signal.SIGCONT:
                    sock.sendall(payload.encode_exit(0))

    with command_socket(tmp_path, agent):
        process = subprocess.Popen([*run.argv, "banking", "x"], stdout=subprocess.PIPE, process_group=0)
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTSTP)
        with arrived:
            assert arrived.wait_for(lambda: seen == [signal.SIGTSTP], WAIT)
        _pid, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        assert process.wait(WAIT) == 0
        process.stdout.close()
    assert signal.SIGCONT in seen
