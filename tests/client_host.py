"""The host as clients see it: command sockets, a stand-in for relayd and the agent, a user's terminal.

Used by tests/unit/test_client*.py. Runs the real programs as processes of their own; nothing of the client
is replaced.
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import vmsilo_wire as wire
from vmsilo_wire import payload

ROOT = Path(__file__).resolve().parent.parent
WAIT = 20.0
Agent = Callable[[socket.socket], None]
Completed = subprocess.CompletedProcess[bytes]


def site_dirs() -> tuple[str, ...]:
    """Where jeepney is for the interpreter that runs the tests; empty if nowhere."""
    spec = importlib.util.find_spec("jeepney")
    return () if spec is None or spec.origin is None else (str(Path(spec.origin).parent.parent),)


def write_program(directory: Path, program: str, *, interpreter_path: tuple[str, ...] = ()) -> list[str]:
    """A command line as the installed script has it, over the tree."""
    script = directory / program
    path = [str(ROOT / "client"), str(ROOT / "guest")]
    script.write_text(
        f"import sys\nsys.path[:0] = {path!r}\nfrom vmsilo.programs import launch\n"
        f"launch({program!r}, {str(directory / 'lib')!r}, {interpreter_path!r}, "
        f"{str(directory / 'run')!r})\n"
    )
    return [sys.executable, "-I", "-S", str(script)]


class Run:
    """vm-run's command line, and what it did."""

    def __init__(self, directory: Path) -> None:
        self.argv = write_program(directory, "vm-run", interpreter_path=site_dirs())

    def __call__(self, *args: str, stdin: bytes = b"", env: dict[str, str] | None = None) -> Completed:
        return subprocess.run(
            [*self.argv, *args],
            input=stdin,
            capture_output=True,
            timeout=60,
            check=False,
            env={**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent", **(env or {})},
        )

    def start(self, *args: str, stdout: int = subprocess.PIPE) -> "subprocess.Popen[bytes]":
        pipe = subprocess.PIPE
        return subprocess.Popen([*self.argv, *args], stdin=pipe, stdout=stdout, stderr=pipe)


def end(process: "subprocess.Popen[bytes]") -> tuple[int, bytes, bytes]:
    try:
        out, err = process.communicate(timeout=WAIT)
    finally:
        process.kill()
    return process.returncode, out or b"", err or b""


class CommandSocket:
    """One VM's command socket: every connection gets the packets, then a descriptor if there is an agent."""

    def __init__(
        self,
        directory: Path,
        agent: Agent | None,
        *,
        name: str = "banking",
        packets: tuple[object, ...] = (),
    ) -> None:
        run = directory / "run"
        run.mkdir(exist_ok=True)
        self.requests: list[dict[str, object]] = []
        self.pause = 0.0
        self.refuse_first = False
        self.dial: Callable[[], socket.socket] | None = None  # gives a connection to a real agent
        self._agent = agent
        self._packets = packets
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(run / f"{name}-command.socket"))
        self._listener.listen()
        self._spawn(self._accept)

    def close(self) -> None:
        for sock in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(WAIT)
        alive = [t for t in self._threads if t.is_alive()]
        for sock in (self._listener, *self._open):
            sock.close()
        assert not alive, "a stand-in's thread did not end"

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            self._spawn(self._answer, connection)

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self.requests.append(json.loads(connection.recv(4096)))
            if self.refuse_first and len(self.requests) == 1:
                return
            for packet in self._packets:
                time.sleep(self.pause)
                connection.send(packet if isinstance(packet, bytes) else json.dumps(packet).encode())
            if self.dial is not None:
                with self.dial() as channel:
                    socket.send_fds(connection, [b'{"ok":true}'], [channel.fileno()])
                return
            if self._agent is None:
                return
            time.sleep(self.pause)
            theirs, ours = socket.socketpair()
            self._open.append(ours)
            with theirs:
                socket.send_fds(connection, [b'{"ok":true}'], [theirs.fileno()])
            connection.close()
            try:
                self._agent(ours)
            finally:
                ours.close()


@contextlib.contextmanager
def command_socket(
    directory: Path, agent: Agent | None, *, name: str = "banking", packets: tuple[object, ...] = ()
) -> Iterator[CommandSocket]:
    host = CommandSocket(directory, agent, name=name, packets=packets)
    try:
        yield host
    finally:
        host.close()


def frames_of(sock: socket.socket) -> Iterator[tuple[int, bytes]]:
    decoder = wire.Decoder(wire.TO_AGENT)
    while True:
        try:
            data = sock.recv(1 << 20)
        except OSError:
            return
        if not data:
            return
        yield from decoder.feed(data)


def run_commands(sock: socket.socket) -> None:
    """An agent without a guest: runs the command on this machine."""
    frames = frames_of(sock)
    kind, data = next(frames)
    assert kind == wire.SPAWN
    spawn = payload.parse_spawn(data)
    lock = threading.Lock()

    def send(frame: bytes) -> None:
        with lock, contextlib.suppress(OSError):
            sock.sendall(frame)

    try:
        child, master = _start(spawn)
    except FileNotFoundError:
        send(payload.encode_error("not-found", f"{spawn.argv[0]}: not found"))
        return
    except PermissionError:
        send(payload.encode_error("not-executable", f"{spawn.argv[0]}: not executable"))
        return
    send(payload.encode_started(child.pid))
    if spawn.detach:
        child.wait(WAIT)
        return
    sources = [(wire.STDOUT, master)] if master >= 0 else []
    if child.stdout is not None and child.stderr is not None:
        sources = [(wire.STDOUT, child.stdout.fileno()), (wire.STDERR, child.stderr.fileno())]
    pumps = [threading.Thread(target=_copy_out, args=(fd, kind, send), daemon=True) for kind, fd in sources]
    stdin = threading.Thread(target=_serve_input, args=(frames, child, master, send), daemon=True)
    for thread in (*pumps, stdin):
        thread.start()
    status = child.wait()
    for thread in pumps:
        thread.join(WAIT)
    send(payload.encode_exit(status))
    sock.shutdown(socket.SHUT_RDWR)
    stdin.join(WAIT)
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    if master >= 0:
        os.close(master)


def _start(spawn: payload.Spawn) -> tuple["subprocess.Popen[bytes]", int]:
    env = {"PATH": os.environ["PATH"], **spawn.env}
    if spawn.pty is None:
        pipe = subprocess.PIPE
        child = subprocess.Popen(
            spawn.argv,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            cwd=spawn.cwd,
            env=env,
            bufsize=0,
            process_group=0,
        )
        return child, -1
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *spawn.pty, 0, 0))
    try:
        return subprocess.Popen(
            spawn.argv,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=spawn.cwd,
            env=env,
            preexec_fn=_take_terminal,
        ), master
    except OSError:
        os.close(master)
        raise
    finally:
        os.close(slave)


def _take_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _copy_out(fd: int, kind: int, send: Callable[[bytes], None]) -> None:
    while True:
        try:
            data = os.read(fd, 65536)
        except OSError:
            return
        if not data:
            return
        send(wire.encode_frame(kind, data))


def _serve_input(
    frames: Iterator[tuple[int, bytes]],
    child: "subprocess.Popen[bytes]",
    master: int,
    send: Callable[[bytes], None],
) -> None:
    fd = master if child.stdin is None else child.stdin.fileno()
    for kind, data in frames:
        if kind == wire.STDIN and not data and child.stdin is not None:
            child.stdin.close()
        elif kind == wire.STDIN:
            left = memoryview(data)
            with contextlib.suppress(OSError):
                while left:
                    left = left[os.write(fd, left) :]
            send(wire.encode_consumed(len(data)))
        elif kind == wire.RESIZE:
            fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", *wire.parse_resize(data), 0, 0))
        elif kind == wire.SIGNAL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, wire.parse_signal(data))
    with contextlib.suppress(ProcessLookupError):
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
