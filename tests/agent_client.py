"""A small blocking client of the wire protocol, and a real agent over a Unix socket, for tests.

`connect`, `Client.hello` and `Client.run` are what a test of something that speaks to an agent needs; every
wait has a deadline, after which TimeoutError is raised.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import vmsilo_wire as wire
from vmsilo_wire.payload import Spawn, encode_hello, encode_spawn, parse_error, parse_exit, parse_started

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = "0123456789abcdef" * 4
SCRIPT = Path(__file__).parent.parent / "guest" / "vmsilo_agent" / "vmsilo-agent"
DEADLINE = 10.0


class Result(NamedTuple):
    """`exit`: code, or minus a signal; None where `error` came instead, or the connection ended."""

    stdout: bytes
    stderr: bytes
    exit: int | None
    error: tuple[str, str] | None = None


def connect(where: str | Path | socket.socket) -> Client:
    if isinstance(where, socket.socket):
        return Client(where)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(where))
    return Client(sock)


class Client:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.unacknowledged = 0
        self._decoder = wire.Decoder(wire.TO_CLIENT)
        self._frames: list[tuple[int, bytes]] = []
        sock.settimeout(DEADLINE)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    def hello(self, role: str = "user", secret: str = SECRET) -> None:
        self.sock.sendall(encode_hello(role, secret))

    def send(self, kind: int, payload: bytes = b"") -> None:
        self.sock.sendall(wire.encode_frame(kind, payload))

    def spawn(
        self,
        *argv: str,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        pty: tuple[int, int] | None = None,
        detach: bool = False,
    ) -> None:
        self.sock.sendall(encode_spawn(Spawn(argv, cwd=cwd, env=env, pty=pty, detach=detach)))

    def receive(self) -> tuple[int, bytes] | None:
        """The next frame; None at the end."""
        while not self._frames:
            try:
                data = self.sock.recv(1 << 20)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._frames = self._decoder.feed(data)
        kind, payload = self._frames.pop(0)
        if kind == wire.CONSUMED:
            self.unacknowledged -= wire.parse_consumed(payload)
        return kind, payload

    def expect(self, wanted: int) -> bytes:
        """Skips CONSUMED; AssertionError for any other frame or the end."""
        while True:
            frame = self.receive()
            if frame is None or frame[0] == wanted:
                break
            assert frame[0] == wire.CONSUMED, frame
        assert frame is not None, "end of stream"
        return frame[1]

    def started(self) -> int:
        return parse_started(self.expect(wire.STARTED))

    def run(
        self,
        *argv: str,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        pty: tuple[int, int] | None = None,
    ) -> Result:
        """After hello().  Sends all of `stdin` and its end, and collects until the agent closes."""
        self.spawn(*argv, cwd=cwd, env=env, pty=pty)
        return self.collect(stdin)

    def collect(self, stdin: bytes | None = b"") -> Result:
        """`stdin` None sends nothing, not even the end."""
        outputs: dict[int, list[bytes]] = {wire.STDOUT: [], wire.STDERR: []}
        status, error = None, None
        for kind, payload in self._exchange(stdin):
            if kind in outputs:
                outputs[kind].append(payload)
            elif kind == wire.EXIT:
                status = parse_exit(payload)
            elif kind == wire.ERROR:
                error = parse_error(payload)
        return Result(b"".join(outputs[wire.STDOUT]), b"".join(outputs[wire.STDERR]), status, error)

    def _exchange(self, stdin: bytes | None) -> Iterator[tuple[int, bytes]]:
        """Sends within the window while it yields frames, until the agent closes."""
        rest = memoryview(stdin or b"")
        eof = stdin is None
        pending = bytearray()
        self.sock.settimeout(0)
        while True:
            try:
                while (frame := self.receive()) is not None:
                    yield frame
                break
            except BlockingIOError:
                pass
            size = min(len(rest), wire.DATA_MAX, wire.STDIN_WINDOW - self.unacknowledged)
            if not pending and (size or not (rest or eof)):
                eof = not rest
                pending += wire.encode_frame(wire.STDIN, bytes(rest[:size]))
                rest = rest[size:]
                self.unacknowledged += size
            readable, writable, _ = select.select([self.sock], [self.sock] if pending else [], [], DEADLINE)
            if not readable and not writable:
                raise TimeoutError("the agent is silent")
            if writable:
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    del pending[: self.sock.send(pending)]
        self.sock.settimeout(DEADLINE)


class AgentProcess:
    """The real agent, as the user that runs the tests; in a cgroup of its own where those are allowed to."""

    def __init__(self, directory: Path, *options: str, user: str | None = None) -> None:
        self.socket = directory / "agent.sock"
        secret = directory / "secret"
        secret.write_text(SECRET + "\n")
        name = (
            user or subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        )
        self.cgroup = _make_cgroup()
        argv = [sys.executable, "-I", "-S", str(SCRIPT), "--listen", f"unix:{self.socket}"]
        argv += ["--secret-file", str(secret), "--user", name]
        if "--announce" not in options:
            argv += ["--announce", "none"]
        argv += options
        if self.cgroup is not None:
            move = f'echo $$ > "{self.cgroup}/cgroup.procs" && exec "$@"'
            argv = ["/bin/sh", "-c", move, "sh", *argv]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        wait_for(self._listens)
        self._idle_fds = self.count_fds()

    @property
    def pid(self) -> int:
        return self.process.pid

    def _listens(self) -> bool:
        assert self.process.poll() is None, "the agent did not start"
        try:
            connect(self.socket).close()
        except OSError:
            return False
        return True

    def connect(self, role: str = "user") -> Client:
        client = connect(self.socket)
        client.hello(role)
        return client

    def run(self, *argv: str, stdin: bytes = b"", env: dict[str, str] | None = None) -> Result:
        with self.connect() as client:
            return client.run(*argv, stdin=stdin, env=env)

    def count_fds(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def children(self) -> list[int]:
        text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(word) for word in text.split()]

    def assert_idle(self) -> None:
        """Nothing of earlier connections is left: no child, no descriptor, no cgroup."""
        wait_for(lambda: not self.children())
        wait_for(lambda: self.count_fds() <= self._idle_fds)
        if self.cgroup is not None:
            cgroup = self.cgroup
            wait_for(lambda: not list(cgroup.glob("cmd-*")))

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(DEADLINE)
        if self.cgroup is not None:
            for path, _, _ in os.walk(self.cgroup, topdown=False):
                kill = Path(path) / "cgroup.kill"
                if kill.exists():
                    kill.write_text("1")
                wait_for(lambda path=path: _remove(Path(path)))


def wait_for(condition: object) -> None:
    """Polls what has no event to wait for."""
    assert callable(condition)
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"still not so: {condition}")
        time.sleep(0.005)


def read_state(pid: int) -> str:
    """The letter of proc_pid_stat(5); X where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def is_alive(pid: int) -> bool:
    return read_state(pid) not in "ZX"


def _remove(path: Path) -> bool:
    try:
        path.rmdir()
    except OSError:
        return not path.exists()
    return True


def _make_cgroup() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            path = Path(mount.split(" ")[4]) / f"vmsilo-test-{os.getpid()}-{time.monotonic_ns()}"
            try:
                path.mkdir()
            except OSError:
                return None
            return path
    return None
