"""vmsilod's end of the relay's control socket: registers VMs, asks for connections, hears of guest
readiness.

Called by the lifecycle on the GLib loop. It holds one connection to vmsilo-relayd and opens it again when
the relay was restarted (the socket is systemd's, so connecting starts the relay). It never reads a byte that
a guest wrote: statuses arrive already checked by the relay.
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

SOCKET_PATH = "/run/vmsilo/relay.sock"
MAX_MESSAGE = 1 << 20
ANSWER_SECONDS = 20.0  # the relay gives up after 15: ten to reach the agent, five for its answer
RECONNECT_SECONDS = 1.0
MESSAGES_PER_TURN = 32

Answer = tuple[dict[str, Any], list[int]]


class RelayClient:
    """One subscribed connection. `on_event(event)` gets each event, `on_connected()` runs after every
    (re)connection.
    """

    def __init__(
        self,
        on_event: Callable[[dict[str, Any]], None],
        on_connected: Callable[[], None],
        path: str = SOCKET_PATH,
    ) -> None:
        self._on_event = on_event
        self._on_connected = on_connected
        self._path = path
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
            log.warning("cannot reach vmsilo-relayd at %s: %s", self._path, error.strerror)
            loop.call_later(RECONNECT_SECONDS, self._reopen)
            return
        self._sock = sock
        self._watch = loop.watch_fd(sock.fileno(), self._readable)
        self._on_connected()

    def close(self) -> None:
        self._closed = True
        self._drop()

    async def add(self, registration: dict[str, Any], fds: Sequence[int]) -> None:
        await self._ask({"op": "add", **registration}, fds)

    async def listen_vsock(self, listener: int) -> None:
        await self._ask({"op": "listen-vsock"}, [listener])

    async def remove(self, name: str, generation: str) -> None:
        await self._ask({"op": "remove", "name": name, "generation": generation})

    async def find_vms(self) -> dict[str, Any]:
        answer, _ = await self._ask({"op": "list"})
        return answer

    async def connect(self, name: str, role: str) -> int:
        """A descriptor connected to the guest agent, authenticated for the role; the caller owns it."""
        return take_one(await self._ask({"op": "connect", "name": name, "role": role}))

    async def dial(self, name: str, port: int) -> int:
        """A descriptor connected to a vsock port of the guest, nothing said yet; the caller owns it."""
        return take_one(await self._ask({"op": "dial", "name": name, "port": port}))

    async def power_off(self, name: str) -> None:
        await self._ask({"op": "poweroff", "name": name})

    async def _ask(self, request: dict[str, Any], fds: Sequence[int] = ()) -> Answer:
        if self._sock is None:
            raise Failed("vmsilo-relayd is not reachable", "systemctl status vmsilo-relayd")
        request_id = next(self._ids)
        future: Future[Answer] = Future()
        try:
            socket.send_fds(self._sock, [json.dumps({"id": request_id, **request}).encode()], fds)
        except OSError as error:
            raise Failed(f"vmsilo-relayd does not take requests: {error.strerror}") from error
        self._waiting[request_id] = future
        try:
            return await loop.with_deadline(future, ANSWER_SECONDS)
        except TimeoutError as error:
            raise Timeout(
                f"vmsilo-relayd did not answer {request['op']} in {ANSWER_SECONDS:.0f} s"
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
                log.warning("connection to vmsilo-relayd failed: %s", error.strerror)
                data, fds = b"", []
            if not data:
                self._drop()
                if not self._closed:
                    log.info("vmsilo-relayd closed the connection; connecting again")
                    loop.call_later(0, self._reopen)
                return
            self._take(json.loads(data), fds)

    def _take(self, message: dict[str, Any], fds: list[int]) -> None:
        future = self._waiting.pop(message.get("id", -1), None)
        if future is None:
            for fd in fds:
                os.close(fd)
            if "event" in message:
                self._on_event(message)
            return
        if "error" in message:
            error = message["error"]
            future.set_exception(
                VmsiloError.from_code(error["code"], error["message"], error.get("hint", ""))
            )
        else:
            future.set_result((message, fds))

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
            future.set_exception(Failed("vmsilo-relayd went away", "try again"))


def take_one(answer: Answer) -> int:
    """The answer's descriptor, which the taker owns."""
    _, fds = answer
    if len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise Failed("the relay answered without a descriptor")
    return fds[0]
