"""A stand-in for vmsilo-consoled: one VM's console socket, its writer and its readers; used by
tests/unit/test_client_shell.py.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
from typing import TYPE_CHECKING, Any

from client_host import WAIT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Attached:
    """One client of the console, from consoled's side."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(WAIT)
        packet = sock.recv(8192)
        assert packet[:1] == b"A", packet
        self.asked: dict[str, Any] = json.loads(packet[1:])

    def send(self, kind: str, payload: bytes | dict[str, Any] = b"") -> None:
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.sock.sendall(kind.encode() + data)

    def welcome(self, *, running: bool = True, writer: bool = True, writer_pid: int | None = None) -> None:
        self.send("S", {"vm": "banking", "running": running, "writer": writer, "writer_pid": writer_pid})

    def read_input(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            packet = self.sock.recv(8192)
            assert packet, f"the client left after {data!r}"
            assert packet[:1] == b"I"
            assert 2 <= len(packet) <= 4097
            data += packet[1:]
        return data

    def is_gone(self) -> bool:
        try:
            return self.sock.recv(8192) == b""
        except ConnectionResetError:  # it left unread what was sent
            return True


class ConsoleSocket:
    """Clients are given out by `next`, in the order in which they came."""

    def __init__(self, directory: Path, name: str) -> None:
        run = directory / "run"
        run.mkdir(exist_ok=True)
        self.path = run / f"{name}-console"
        self.all: list[Attached] = []
        self._clients: queue.Queue[Attached] = queue.Queue()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def next(self) -> Attached:
        return self._clients.get(timeout=WAIT)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(WAIT)
        self._listener.close()
        for client in self.all:
            client.sock.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            client = Attached(sock)
            self.all.append(client)
            self._clients.put(client)


@contextlib.contextmanager
def console_socket(directory: Path, name: str = "banking") -> Iterator[ConsoleSocket]:
    host = ConsoleSocket(directory, name)
    try:
        yield host
    finally:
        host.close()


@contextlib.contextmanager
def serving(console: ConsoleSocket, serve: Callable[[Attached], None]) -> Iterator[None]:
    """`serve` has the next client, beside a program that the test waits for."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            serve(console.next())
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(WAIT)
    assert not thread.is_alive()
    assert not failures, failures
