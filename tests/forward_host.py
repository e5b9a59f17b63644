"""A host for tests of vmsilo-forward: the real forwarder, relay and agent, on Unix sockets.

Pipe stands in for the vsock device, with its worst trait: it cannot close half a connection, and when one
end closes it closes the other. Vmsilod answers the forwarder as vmsilod does, by the real relay.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

from agent_client import SECRET, AgentProcess
from relay_host import PATIENCE, ROOT, Control, RelayHost, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHIM = """
import os, sys
sys.path[:0] = sys.argv[1:3]
count = int(sys.argv[3])
if count:
    high = [os.dup(3 + index) for index in range(count)]
    names = ":".join(["l"] * count)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count), LISTEN_FDNAMES=names)
from vmsilo_forward.__main__ import main
sys.exit(main(sys.argv[4:]))
"""


class Pipe:
    """CONNECT 700 at `path` reaches the agent's socket."""

    def __init__(self, path: Path, agent: Path) -> None:
        self._agent = agent
        self.open: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(128)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """As when the guest is gone."""
        for sock in self.open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        while True:
            try:
                host, _ = self._listener.accept()
            except OSError:
                return
            line = b""
            while not line.endswith(b"\n"):
                line += host.recv(1)
            assert line == b"CONNECT 700\n"
            guest = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            guest.connect(str(self._agent))
            host.sendall(b"OK 1\n")
            self.open += [host, guest]
            for pair in ((host, guest), (guest, host)):
                threading.Thread(target=self._copy, args=pair, daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class Vmsilod:
    """Answers at control.sock as long as it is open."""

    def __init__(self, path: Path, relay: ForwardHost) -> None:
        self.questions: list[dict[str, Any]] = []
        self.forwards: list[tuple[bool, str, int, int]] = []
        self.listeners: list[socket.socket] = []
        self._relay = relay
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for sock in self.listeners:
            sock.close()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                question = json.loads(sock.recv(4096))
                self.questions.append(question)
                self._answer(sock, listening=question["listening"])

    def _answer(self, sock: socket.socket, *, listening: bool) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, its:
            try:
                answer = self._relay.bring(ours)
            except OSError:
                answer = {"error": {}}
            if "error" in answer:
                sock.send(json.dumps({"error": {"message": "the relay is away"}}).encode())
                return
            passed = [] if listening else self.listeners
            fds = [its.fileno(), *(listener.fileno() for listener in passed)]
            socket.send_fds(sock, [json.dumps({"forwards": self.forwards}).encode()], fds)


class ForwardHost:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stack = contextlib.ExitStack()
        self.relay = RelayHost(directory)
        self.stack.callback(self.relay.close)
        self.agent = AgentProcess(directory)
        self.stack.callback(self.agent.stop)
        self.pipe = Pipe(directory / "banking.vsock", self.agent.socket)
        self.stack.callback(self.pipe.close)
        self.vmsilod = Vmsilod(directory / "control.sock", self)
        self.stack.callback(self.vmsilod.close)
        self.process: subprocess.Popen[bytes] | None = None
        self.log = directory / "forward.log"
        self.control: Control = self.relay.start()
        self.relay.add(self.control, secret=SECRET)

    def bring(self, link: socket.socket) -> dict[str, Any]:
        """As vmsilod asks the relay, over a connection of its own."""
        with contextlib.closing(Control(self.directory / "relay.sock").sock) as sock:
            packet = {"id": 1, "op": "forward", "name": "banking", "generation": "g1"}
            socket.send_fds(sock, [json.dumps(packet).encode()], [link.fileno()])
            answer: dict[str, Any] = json.loads(sock.recv(4096))
            return answer

    def listen(self) -> socket.socket:
        """A TCP listener of the loopback, closed with the host."""
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(PATIENCE)
        self.stack.callback(listener.close)
        return listener

    def from_host(self, guest_port: int) -> int:
        """Configure a forward; its port on the host."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.vmsilod.listeners.append(listener)
        port = int(listener.getsockname()[1])
        self.vmsilod.forwards.append((True, "127.0.0.1", port, guest_port))
        return port

    def from_guest(self, host_port: int) -> int:
        """Configure a forward; its port in the guest, which here has the host's loopback."""
        port = find_free_port()
        self.vmsilod.forwards.append((False, "127.0.0.1", host_port, port))
        return port

    def start(self, *, stored: bool = False) -> None:
        """Start the forwarder; `stored`: as after a crash, with its listeners from systemd's store."""
        kept = [sock.fileno() for sock in self.vmsilod.listeners] if stored else []

        def place() -> None:
            high = [os.dup(fd) for fd in kept]
            for index, fd in enumerate(high):
                os.dup2(fd, 3 + index)

        argv = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            SHIM,
            str(ROOT / "daemon"),
            str(ROOT / "guest"),
            str(len(kept)),
        ]
        argv += ["banking", "--control", str(self.directory / "control.sock")]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(argv, stderr=log, preexec_fn=place, close_fds=not kept, env={})
        self.stack.callback(self.kill)
        wait_until(lambda: len(self.vmsilod.questions) > 0, "the question")

    def kill(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE)

    def count_fds(self) -> int:
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))  # noqa: PTH208

    def connect(self, port: int) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.stack.callback(sock.close)
        return sock

    def connect_when_open(self, port: int) -> socket.socket:
        """To a port that the agent will listen to soon."""
        found: list[socket.socket] = []

        def attempt() -> bool:
            with contextlib.suppress(ConnectionRefusedError, ConnectionResetError):
                found.append(self.connect(port))
            return bool(found)

        wait_until(attempt, f"a listener at {port}")
        return found[0]


@contextlib.contextmanager
def run_forwards(directory: Path) -> Iterator[ForwardHost]:
    host = ForwardHost(directory)
    try:
        yield host
        if host.process is not None:
            assert host.process.poll() is None, host.log.read_text()
        text = host.log.read_text() if host.log.exists() else ""
        assert "Error" not in text, text
        assert "failed" not in text, text
    finally:
        host.stack.close()


def find_free_port() -> int:
    """Below those that connections get, or one that waits for a listener there might meet itself."""
    while True:
        port = random.randrange(20000, 30000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def read_all(sock: socket.socket) -> bytes:
    data = bytearray()
    while piece := sock.recv(1 << 20):
        data += piece
    return bytes(data)
