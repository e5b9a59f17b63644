"""A connection to the guest's agent on its way to become a forward: asked for, told its port, answered.

Owned by whoever wants the forward, who gets the socket once the agent said CONNECTED. Reads what the guest
sends up to that frame and not a byte beyond it.
"""

from __future__ import annotations

import re

from vmsilo_relay.journal import ERROR as LOG_ERROR
from vmsilo_relay.loop import READ
from vmsilo_wire import CONNECTED, ERROR, HEADER_SIZE, Decoder, ProtocolError
from vmsilo_wire.payload import parse_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmsilo_forward.context import Context
    from vmsilo_forward.link import Link

ERROR_MAX = 1024  # bytes of the payload; the agent's reasons are short
REASON_MAX = 120
UNPRINTABLE = re.compile(r"[^\x20-\x7e]")


class Opening:
    """`done(framed, reason)` is called once, unless cancelled, and not from within `start`."""

    def __init__(
        self, context: Context, link: Link, frame: bytes, done: Callable[[socket.socket | None, str], None]
    ) -> None:
        self._context = context
        self._link = link
        self._frame = frame
        self._done: Callable[[socket.socket | None, str], None] | None = done
        self._framed: socket.socket | None = None
        self._withdraw: Callable[[], None] = lambda: None
        self._decoder = Decoder({CONNECTED: (0, 0), ERROR: (2, ERROR_MAX)})
        self._expected = HEADER_SIZE

    def start(self) -> None:
        self._withdraw = self._link.open(self._opened)

    def cancel(self) -> None:
        self._done = None
        self._withdraw()
        self._drop()

    def _opened(self, framed: socket.socket | None, reason: str) -> None:
        if framed is None:
            self._finish(None, reason)
            return
        self._framed = framed
        framed.settimeout(0)
        try:
            framed.send(self._frame)  # a few bytes, to a socket with room for them
        except OSError as exc:
            self._finish(None, exc.strerror or repr(exc))
            return
        self._context.loop.watch(framed.fileno(), READ, self._on_event, self._fail)

    def _on_event(self, _events: int) -> None:
        assert self._framed is not None
        try:
            untrusted_data = self._framed.recv(self._expected)
        except BlockingIOError:
            return
        except OSError as exc:
            self._finish(None, exc.strerror or repr(exc))
            return
        if not untrusted_data:
            self._finish(None, "the guest closed the connection")
            return
        try:
            frames = self._decoder.feed(untrusted_data)
            pending = self._decoder.pending
            if not frames:
                # The payload's length is not told, so it is read as it comes: nothing may follow an ERROR.
                self._expected = HEADER_SIZE - pending if pending < HEADER_SIZE else ERROR_MAX
            elif frames[0][0] == CONNECTED:
                self._finish(self._framed, "")
            else:
                self._finish(None, UNPRINTABLE.sub("?", parse_error(frames[0][1])[1])[:REASON_MAX])
        except ProtocolError as exc:
            self._finish(None, str(exc))

    def _finish(self, framed: socket.socket | None, reason: str) -> None:
        done, self._done = self._done, None
        if framed is not None:
            self._context.loop.forget(framed.fileno())
            self._framed = None
        self._drop()
        if done is not None:
            done(framed, reason)
        elif framed is not None:
            framed.close()

    def _drop(self) -> None:
        framed, self._framed = self._framed, None
        if framed is not None:
            self._context.loop.forget(framed.fileno())
            framed.close()

    def _fail(self, error: Exception) -> None:
        self._context.journal.log(LOG_ERROR, "forward", f"opening a connection failed: {error!r}")
        self._finish(None, "internal error")
