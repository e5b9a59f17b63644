"""A real HTTP server on a Unix socket with cloud-hypervisor's paths, for tests of what talks to it."""

from __future__ import annotations

import io
import json
import os
import socket
import socketserver
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
INFO = {
    "config": {
        "memory": {"size": 1024 * MIB, "hotplug_size": 1024 * MIB, "hotplugged_size": 512 * MIB},
        "balloon": {"size": 0},
    },
    "state": "Running",
    "memory_actual_size": 1280 * MIB,
}


class Server(socketserver.ThreadingUnixStreamServer):
    """`answers`: path -> (status, body) as HTTP, bytes as they are; no entry: 404."""

    daemon_threads = True

    def __init__(self, path: Path, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.requests: list[tuple[str, str, Any]] = []
        self.files: list[str] = []
        """What the descriptors lead to that came with the requests."""
        super().__init__(str(path), Handler)


class Receiver(io.RawIOBase):
    """A connection as a file; closes the descriptors that come with its bytes after a look at them."""

    def __init__(self, connection: socket.socket, files: list[str]) -> None:
        self._connection = connection
        self._files = files

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data, fds, _, _ = socket.recv_fds(self._connection, len(buffer), 16)
        for fd in fds:
            self._files.append(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115
            os.close(fd)
        buffer[: len(data)] = data
        return len(data)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(Receiver(self.connection, self.server.files))

    def do_GET(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        name = self.path.removeprefix("/api/v1/")
        self.server.requests.append((self.command, name, json.loads(body) if body else None))
        answer = self.server.answers.get(name, (404, b"[]"))
        if isinstance(answer, bytes):
            self.close_connection = True
            self.wfile.write(answer)
            return
        status, content = answer
        self.send_response(status)
        if content:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def cloud_hypervisor_that_answers(path: Path, answers: dict[str, Any]) -> Iterator[Server]:
    with Server(path, answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
