"""A host for tests of vmsilo-relayd: the real process, with a manager, a vsock device and clients around it.

Manager stands in for systemd (notification socket and descriptor store), Device for vhost-device-vsock. Both
speak the real protocol on Unix sockets. RelayHost ends everything it started and sees what relayd left open.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsilo_wire import HEADER_SIZE, HELLO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
SECRET = "ab" * 32
PATIENCE = 10.0  # far above what anything here takes, so that only a hang fails

SHIM = """
import os, sys
sys.path[:0] = sys.argv[1:3]
names, numbers = sys.argv[3].split(":"), [int(n) for n in sys.argv[4].split(":")] if sys.argv[4] else []
if numbers:
    import fcntl
    high = [fcntl.fcntl(n, fcntl.F_DUPFD_CLOEXEC, 500) for n in numbers]
    for n in numbers:
        os.close(n)
    for index, n in enumerate(high):
        os.dup2(n, 3 + index)
        os.close(n)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(high)), LISTEN_FDNAMES=":".join(names))
    del fcntl
from vmsilo_relay.__main__ import main
sys.exit(main(sys.argv[5:]))
"""


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.005)


class Manager:
    """systemd's end of NOTIFY_SOCKET; keeps the stored descriptors as systemd does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store: dict[str, list[int]] = {}
        self.messages: list[str] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"STOP", str(self.path))
        self._thread.join()
        self._sock.close()
        for fds in self.store.values():
            for fd in fds:
                os.close(fd)

    def _run(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._sock, 4096, 4)
            if data == b"STOP":
                return
            message = data.decode()
            fields = dict(line.split("=", 1) for line in message.split("\n"))
            name = fields.get("FDNAME", "stored")
            if "FDSTOREREMOVE" in fields:
                for fd in self.store.pop(name, []):
                    os.close(fd)
            if "FDSTORE" in fields:
                self.store.setdefault(name, []).extend(fds)
            self.messages.append(message)


class Agent:
    """One connection that reached the guest, as far as HELLO."""

    def __init__(self, sock: socket.socket, hello: dict[str, Any]) -> None:
        self.sock = sock
        self.hello = hello


class Device:
    """A hybrid vsock device: `answer` is what it says to CONNECT; None says nothing, b"" hangs up."""

    def __init__(self, path: Path, answer: bytes | None = b"OK 1073741824\n", *, backlog: int = 128) -> None:
        self.path = path
        self.answer = answer
        self.greeting = b""  # what the agent says before it is spoken to
        self.agents: queue.Queue[Agent] = queue.Queue()
        self.dialled: queue.Queue[socket.socket] = queue.Queue()  # at port 22
        self.connects = 0
        self._socks: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(backlog)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for sock in self._socks:
            sock.close()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connects += 1
            sock.settimeout(PATIENCE)
            self._socks.append(sock)
            if self.answer == b"":
                sock.close()
                continue
            with contextlib.suppress(OSError, ValueError):
                self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        line = b""
        while not line.endswith(b"\n"):
            line += read_exactly(sock, 1)
        if line not in (b"CONNECT 700\n", b"CONNECT 22\n"):
            raise ValueError(line)
        if self.answer is None:
            return
        sock.sendall(self.answer + self.greeting)
        if not self.answer.startswith(b"OK"):
            return
        if line == b"CONNECT 22\n":
            self.dialled.put(sock)
            return
        kind, length = struct.unpack(">BI", read_exactly(sock, HEADER_SIZE))
        if kind != HELLO:
            raise ValueError(kind)
        self.agents.put(Agent(sock, json.loads(read_exactly(sock, length))))


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise ValueError("closed early")
        data += part
    return data


class Control:
    """vmsilod's end of relay.sock."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(path))
        self._id = 0

    def send(self, op: str, rights: list[int] | None = None, /, **fields: object) -> int:
        self._id += 1
        packet = json.dumps({"id": self._id, "op": op, **fields}).encode()
        socket.send_fds(self.sock, [packet], rights or [])
        return self._id

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        data, fds, _, _ = socket.recv_fds(self.sock, 1 << 20, 4)
        return json.loads(data), fds

    def call(self, op: str, rights: list[int] | None = None, /, **fields: object) -> dict[str, Any]:
        number = self.send(op, rights, **fields)
        reply, got = self.receive()
        assert reply.pop("id") == number
        assert got == []
        return reply


class Client:
    """vm-run's end of a command socket."""

    def __init__(self, path: Path, packet: bytes | None = None, *, wait: float | None = 5) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(path))
        if packet is None:
            packet = json.dumps({"v": 1, "op": "connect", "wait": wait}).encode()
        if packet:
            with contextlib.suppress(BrokenPipeError):  # refused before it asked; the reason can be read
                self.sock.send(packet)

    def receive(self) -> tuple[dict[str, Any], socket.socket | None]:
        data, fds, _, _ = socket.recv_fds(self.sock, 8192, 1)
        assert data, "closed without an answer"
        return json.loads(data), socket.socket(fileno=fds[0]) if fds else None

    def finish(self) -> tuple[dict[str, Any], socket.socket | None]:
        """The last packet, after which relayd has closed."""
        while True:
            packet, agent = self.receive()
            if packet.get("state") != "booting":
                assert self.sock.recv(10) == b""
                self.sock.close()
                return packet, agent

    def error(self) -> str:
        packet, agent = self.finish()
        assert agent is None
        return str(packet["error"]["code"])


class RelayHost:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stack = contextlib.ExitStack()
        self.connections = contextlib.ExitStack()  # to relayd
        self.state = directory / "state"
        self.state.mkdir(mode=0o700)
        self.manager = Manager(directory / "notify")
        self.stack.callback(self.manager.close)
        self.listener = self._listen(directory / "relay.sock", socket.SOCK_SEQPACKET)
        self.process: subprocess.Popen[bytes] | None = None
        self.log = directory / "log"
        self.baseline = 0

    def start(self, *limits: str, **environ: str) -> Control:
        """Start relayd as systemd would, with what the store holds; returns vmsilod's connection."""
        named = [("control", self.listener.fileno())]
        named += [(name, fd) for name, fds in self.manager.store.items() for fd in fds]
        names, numbers = ":".join(n for n, _ in named), ":".join(str(fd) for _, fd in named)
        ready = self.manager.messages.count("READY=1\nSTATUS=Relaying")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    "-c",
                    SHIM,
                    str(ROOT / "daemon"),
                    str(ROOT / "guest"),
                    names,
                    numbers,
                ]
                + [word for limit in limits for word in ("--limit", limit)],
                pass_fds=[fd for _, fd in named],
                stderr=log,
                env={
                    "NOTIFY_SOCKET": str(self.manager.path),
                    "RUNTIME_DIRECTORY": str(self.state),
                    **environ,
                },
            )
        wait_until(
            lambda: self.manager.messages.count("READY=1\nSTATUS=Relaying") > ready or self.is_dead(),
            "READY=1",
        )
        assert not self.is_dead(), self.log.read_text()
        if not self.baseline:
            self.baseline = self.count_fds()
        return self.control()

    def control(self) -> Control:
        control = Control(self.directory / "relay.sock")
        self.connections.callback(control.sock.close)
        return control

    def is_dead(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def kill(self, number: int = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if not self.is_dead():
            self.kill()
        self.connections.close()
        self.stack.close()

    def add(self, control: Control, name: str = "banking", /, **fields: object) -> dict[str, Any]:
        """Add a VM of a hybrid device with both listeners, bound at NAME.command and NAME.701."""
        command = self._listen(self.directory / f"{name}.command", socket.SOCK_SEQPACKET)
        host_port = self._listen(self.directory / f"{name}.701", socket.SOCK_STREAM)
        order = {
            "name": name,
            "generation": "g1",
            "secret": SECRET,
            "owner": 1000,
            "channel": {"type": "hybrid", "path": str(self.directory / f"{name}.vsock"), "uid": os.getuid()},
            "start_timeout": 5,
            "fds": ["command", "host-port"],
        }
        return control.call("add", [command.fileno(), host_port.fileno()], **{**order, **fields})

    def device(
        self, name: str = "banking", answer: bytes | None = b"OK 7\n", *, backlog: int = 128
    ) -> Device:
        device = Device(self.directory / f"{name}.vsock", answer, backlog=backlog)
        self.stack.callback(device.close)
        return device

    def client(
        self, packet: bytes | None = None, *, name: str = "banking", wait: float | None = 5
    ) -> Client:
        client = Client(self.directory / f"{name}.command", packet, wait=wait)
        self.connections.callback(client.sock.close)
        return client

    def say(self, message: bytes, name: str = "banking") -> None:
        """What the guest's first process does: send, then wait until the host has closed."""
        with self.speak(name) as sock:
            sock.sendall(message)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""

    def speak(self, name: str = "banking") -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(PATIENCE)
        sock.connect(str(self.directory / f"{name}.701"))
        return sock

    def make_ready(self, name: str = "banking") -> None:
        self.say(b"X_VMSILO_AGENT=1\nX_VMSILO_READY_FROM=systemd", name)
        self.say(b"READY=1\nSTATUS=Startup finished", name)

    def count_fds(self) -> int:
        assert self.process is not None
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def memory(self) -> int:
        """Resident kilobytes."""
        assert self.process is not None
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        return 0

    def cpu_seconds(self) -> float:
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def assert_nothing_left(self) -> None:
        """Remove all VMs, hang up everywhere, and see that relayd has the descriptors it began with."""
        control = self.control()
        for vm in control.call("list")["vms"]:
            assert control.call("remove", name=vm["name"], generation=vm["generation"]) == {"ok": True}
        assert list(self.state.iterdir()) == []
        self.connections.close()
        wait_until(lambda: self.count_fds() == self.baseline, f"{self.baseline} open descriptors")
        wait_until(lambda: self.manager.store == {}, "an empty descriptor store")
        assert "Traceback" not in self.log.read_text()
        assert "Error" not in self.log.read_text()

    def _listen(self, path: Path, kind: socket.SocketKind) -> socket.socket:
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, kind)
        self.stack.callback(sock.close)
        sock.bind(str(path))
        sock.listen(1024)
        return sock


@contextlib.contextmanager
def run_host(directory: Path) -> Iterator[RelayHost]:
    """A host whose relayd must be alive, quiet and without a leftover descriptor when the test is done."""
    host = RelayHost(directory)
    try:
        yield host
        host.assert_nothing_left()
    finally:
        host.close()
