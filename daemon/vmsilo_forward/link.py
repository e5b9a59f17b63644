"""The link to the relay, which opens connections to the guest's agent and hands them over.

Owned by `main`; given a socket by vmsilod's order, and another after that one broke. Whoever wants a
connection gives a callback, which is called once: with the socket, or with None and the reason.
"""

from __future__ import annotations

import itertools
import json
import socket

from vmsilo_relay.journal import ERROR
from vmsilo_relay.loop import READ
from vmsilo_relay.packet import close_fds, receive_packet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmsilo_forward.context import Context

    Opened = Callable[[socket.socket | None, str], None]

PACKET_MAX = 4096
PACKETS_PER_TURN = 16


class Link:
    """`on_ready(ready)`: the guest can be reached, or cannot any more. `on_restart()`: its agent is a
    new one, so no connection of the old one is worth anything. `on_lost()`: another link is needed.
    """

    def __init__(self, context: Context, name: str) -> None:
        self._context = context
        self._name = name
        self._sock: socket.socket | None = None
        self._ids = itertools.count(1)
        self._open: dict[int, Opened] = {}
        self.ready = False
        self.on_ready: Callable[[bool], None] = lambda _ready: None
        self.on_restart: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None

    def use(self, sock: socket.socket) -> None:
        self._drop()
        sock.settimeout(0)
        self._sock = sock
        self._context.loop.watch(sock.fileno(), READ, self._on_event, self._fail)

    def open(self, opened: Opened) -> Callable[[], None]:
        """Ask for a connection; what is returned withdraws the question."""
        number = next(self._ids)
        self._open[number] = opened

        def withdraw() -> None:
            self._open.pop(number, None)

        try:
            if self._sock is None:
                raise ConnectionResetError
            self._sock.send(json.dumps({"id": number}).encode(), socket.MSG_NOSIGNAL)
        except OSError:  # full, or lost, which is noticed where it is read
            self._context.loop.after(0, lambda: self._answer(number, None, "the relay is away"), self._fail)
        return withdraw

    def _answer(self, number: int, sock: socket.socket | None, reason: str) -> None:
        opened = self._open.pop(number, None)
        if opened is not None:
            opened(sock, reason)
        elif sock is not None:
            sock.close()

    def _on_event(self, _events: int) -> None:
        for _ in range(PACKETS_PER_TURN):
            if self._sock is None:
                return
            try:
                packet, fds, _ = receive_packet(self._sock, PACKET_MAX, 1)
            except BlockingIOError:
                return
            except OSError:
                packet, fds = b"", []
            if not packet:
                self._lose()
                return
            try:
                self._take(json.loads(packet), fds)
            finally:
                close_fds(fds)

    def _take(self, packet: dict[str, object], fds: list[int]) -> None:
        number = packet.get("id")
        if isinstance(number, int):
            error = packet.get("error")
            reason = str(error.get("message", "")) if isinstance(error, dict) else ""
            self._answer(number, socket.socket(fileno=fds.pop()) if fds else None, reason)
        elif packet.get("restarted") is True:
            self.on_restart()
        elif isinstance(packet.get("ready"), bool) and packet["ready"] != self.ready:
            self.ready = packet["ready"] is True
            self.on_ready(self.ready)

    def _lose(self) -> None:
        self._drop()
        self.on_lost()

    def _drop(self) -> None:
        """Connections that were handed over live on; whether the guest is ready, the next link says."""
        sock, self._sock = self._sock, None
        self.ready = False
        if sock is None:
            return
        self._context.loop.forget(sock.fileno())
        sock.close()
        for number in tuple(self._open):
            self._answer(number, None, "the relay went away")

    def _fail(self, error: Exception) -> None:
        self._context.journal.log(ERROR, self._name, f"the relay's link failed: {error!r}")
        if self._sock is not None:
            self._lose()
