"""What vmsilod told this process to do, and the question for it.

The question goes over vmsilod's control socket, which knows from the kernel which unit asks. Asked at the
start, and again whenever the relay's end of the link was lost: vmsilod brings the two together anew.
Nothing here waits: connections go on while vmsilod is away.
"""

from __future__ import annotations

import json
import socket

from vmsilo_relay.journal import INFO
from vmsilo_relay.loop import READ
from vmsilo_relay.packet import close_fds, receive_packet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmsilo_relay.loop import Timer

    from vmsilo_forward.context import Context

REPLY_MAX = 64 * 1024
FDS_MAX = 128  # the link and 64 listeners


class Order:
    """`forwards`: (from the host?, host address, host port, guest port); `link` and `listeners` are the
    taker's. Listeners come only to who said that it has none.
    """

    def __init__(
        self, forwards: list[tuple[bool, str, int, int]], link: socket.socket, listeners: list[socket.socket]
    ) -> None:
        self.forwards = forwards
        self.link = link
        self.listeners = listeners


class Question:
    """Asks until it is answered: `answered(order)`."""

    def __init__(self, context: Context, path: str, name: str, answered: Callable[[Order], None]) -> None:
        self._context = context
        self._path = path
        self._name = name
        self._answered = answered
        self._sock: socket.socket | None = None
        self._timer: Timer | None = None
        self.has_listeners = False

    def ask(self) -> None:
        """No question may be open."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        sock.settimeout(0)
        self._sock = sock
        question = {"op": "forward", "name": self._name, "listening": self.has_listeners}
        try:
            sock.connect(self._path)
            sock.send(json.dumps(question).encode())
        except OSError as exc:
            self._try_later(exc.strerror or repr(exc))
            return
        loop = self._context.loop
        self._timer = loop.after(
            self._context.limits.ask_seconds, lambda: self._try_later("no answer"), self._fail
        )
        loop.watch(sock.fileno(), READ, self._on_answer, self._fail)

    def _on_answer(self, _events: int) -> None:
        assert self._sock is not None
        try:
            packet, fds, truncated = receive_packet(self._sock, REPLY_MAX, FDS_MAX)
        except BlockingIOError:
            return
        except OSError as exc:
            self._try_later(exc.strerror or repr(exc))
            return
        try:
            answer = json.loads(packet) if packet else {"error": {"message": "vmsilod went away"}}
            if truncated or "error" in answer or not fds:
                self._try_later(answer.get("error", {}).get("message", "the answer was cut short"))
                return
            sockets = [socket.socket(fileno=fd) for fd in fds]
            fds.clear()
        finally:
            close_fds(fds)
        self._let_go()
        forwards = [tuple(entry) for entry in answer["forwards"]]
        self._answered(Order(forwards, sockets[0], sockets[1:]))

    def _try_later(self, reason: str) -> None:
        self._context.journal.log(INFO, self._name, f"vmsilod gives no order, asking again: {reason}")
        self._let_go()
        self._timer = self._context.loop.after(self._context.limits.ask_again_seconds, self.ask, self._fail)

    def _let_go(self) -> None:
        sock, self._sock = self._sock, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if sock is not None:
            self._context.loop.forget(sock.fileno())
            sock.close()

    def _fail(self, error: Exception) -> None:
        self._try_later(repr(error))
