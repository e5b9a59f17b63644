"""One listening socket on the loop: accepts a bounded number at a time and rests when descriptors run out.

Owned by whoever listens in relayd or consoled; what to do with a connection is the owner's. `close` ends it.
"""

from __future__ import annotations

import contextlib
import socket

from vmsilo_relay.journal import ERROR
from vmsilo_relay.loop import READ
from vmsilo_relay.packet import Refusal, accept

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmsilo_relay.context import Context
    from vmsilo_relay.loop import Timer

    OnAccept = Callable[[socket.socket, object], None]


class Listener:
    """`on_accept(sock, address)` gets each connection, non-blocking, and with it the duty to close it."""

    def __init__(self, context: Context, subject: str, sock: socket.socket, on_accept: OnAccept) -> None:
        self._context = context
        self._subject = subject
        self._sock = sock
        self._on_accept = on_accept
        self._pause: Timer | None = None
        sock.settimeout(0)
        self._resume()

    def close(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        self._context.loop.forget(self._sock.fileno())
        self._sock.close()

    def _resume(self) -> None:
        self._pause = None
        self._context.loop.watch(self._sock.fileno(), READ, self._on_event, self._fail)

    def _on_event(self, _events: int) -> None:
        for _ in range(self._context.limits.accepts_per_wakeup):
            accepted = accept(self._sock)
            if accepted is None:
                return
            sock, address = accepted
            try:
                self._on_accept(sock, address)
            except Exception as error:
                self._context.journal.log(ERROR, self._subject, f"a new connection was lost: {error!r}")
                sock.close()

    def _fail(self, error: Exception) -> None:
        """Descriptors or memory ran out: rest, because the waiting connection would wake us at once."""
        self._context.journal.log(ERROR, self._subject, f"can't accept: {error}")
        loop = self._context.loop
        loop.forget(self._sock.fileno())
        self._pause = loop.after(self._context.limits.pause_seconds, self._resume, self._fail)


def check_listener(sock: socket.socket, family: int, kind: int) -> None:
    """Raises Refusal unless `sock` is a listening socket of this family and type."""
    listening = 0
    with contextlib.suppress(OSError):
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family != family or sock.type != kind or not listening:
        raise Refusal("bad-request", f"descriptor {sock.fileno()} is not a listener of the right kind")
