"""vmsilod's end of a control socket of vmsilo-relayd or vmsilo-consoled: orders, answers, events.

Held by relay_client.py and consoles.py, on the GLib loop. One connection, opened again when the other side
was restarted (the socket is systemd's, so connecting starts it). It does not know what the orders mean, and
trusts the other side no further than that: a malformed answer fails one order.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from gi.repository import GLib

from vmsilod import loop
from vmsilod.errors import Failed, Timeout, VmsiloError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

MAX_MESSAGE = 1 << 20
ANSWER_SECONDS = 20.0  # the relay gives up after 15: ten to reach the agent, five for its answer
RECONNECT_SECONDS = 1.0
MESSAGES_PER_TURN = 32

Answer = tuple[dict[str, Any], list[int]]


class OrderSocket:
    """One subscribed connection to `program` at `path`. `on_event(event)` gets each event, `on_connected()`
    runs after every (re)connection.
    """

    def __init__(
        self,
        program: str,
        path: str,
        on_event: Callable[[dict[str, Any]], None],
        on_connected: Callable[[], None],
    ) -> None:
        self._program = program
        self._path = path
        self._on_event = on_event
        self._on_connected = on_connected
        self._ids = itertools.count(1)
        self._waiting: dict[int, Future[Answer]] = {}
        self._sock: socket.socket | None = None
        self._watch = 0
        self._closed = False

    def open(self) -> None:
        """Connect and subscribe; when that fails now, it is tried again from a timer."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(self._path)
            sock.settimeout(0)
            sock.send(json.dumps({"id": 0, "op": "subscribe"}).encode())
        except OSError as error:
            sock.close()
            log.warning("cannot reach %s at %s: %s", self._program, self._path, error.strerror)
            loop.call_later(RECONNECT_SECONDS, self._reopen)
            return
        self._sock = sock
        self._watch = loop.watch_fd(sock.fileno(), self._readable)
        self._on_connected()

    def close(self) -> None:
        self._closed = True
        self._drop()

    async def order(self, request: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """The answer to an order that brings no descriptor."""
        answer, unasked = await self.ask(request, fds)
        for fd in unasked:
            os.close(fd)
        return answer

    async def ask(self, request: dict[str, Any], fds: Sequence[int] = ()) -> Answer:
        if self._sock is None:
            raise Failed(f"{self._program} is not reachable", f"systemctl status {self._program}")
        request_id = next(self._ids)
        future: Future[Answer] = Future()
        try:
            socket.send_fds(self._sock, [json.dumps({"id": request_id, **request}).encode()], fds)
        except OSError as error:
            raise Failed(f"{self._program} does not take requests: {error.strerror}") from error
        self._waiting[request_id] = future
        try:
            return await loop.with_deadline(future, ANSWER_SECONDS)
        except TimeoutError as error:
            raise Timeout(
                f"{self._program} did not answer {request['op']} in {ANSWER_SECONDS:.0f} s"
            ) from error
        finally:
            self._waiting.pop(request_id, None)

    def _readable(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            if self._sock is None:
                return
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE, 4)
            except BlockingIOError:
                return
            except OSError as error:
                log.warning("connection to %s failed: %s", self._program, error.strerror)
                data, fds = b"", []
            if not data:
                self._drop()
                if not self._closed:
                    log.info("%s closed the connection; connecting again", self._program)
                    loop.call_later(0, self._reopen)
                return
            try:
                self._take(json.loads(data), fds)
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
                log.error("%s says what cannot be read (%r); connecting again", self._program, error)
                self._drop()
                loop.call_later(RECONNECT_SECONDS, self._reopen)
            finally:
                for fd in fds:
                    os.close(fd)

    def _take(self, message: dict[str, Any], fds: list[int]) -> None:
        """Takes out of `fds` what somebody waits for."""
        number = message.get("id", -1)
        future = self._waiting.get(number)
        if future is None:
            if "event" in message:
                self._on_event(message)
            return
        error = message.get("error")
        failure = (
            VmsiloError.from_code(error["code"], error["message"], error.get("hint", "")) if error else None
        )
        del self._waiting[number]
        if failure is not None:
            future.set_exception(failure)
        else:
            future.set_result((message, list(fds)))
            fds.clear()

    def _reopen(self) -> None:
        if not self._closed and self._sock is None:
            self.open()

    def _drop(self) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            GLib.source_remove(self._watch)
            sock.close()
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(Failed(f"{self._program} went away", "try again"))
