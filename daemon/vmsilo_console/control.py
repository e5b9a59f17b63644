"""console.sock: vmsilod's orders to consoled.

A Controller is one connection, from accept until it closes or breaks the rules. Every order is carried out
and answered at once. Only root (and the uid of --admin-uid) is admitted, by the kernel's word.
"""

from __future__ import annotations

from collections import deque

from vmsilo_relay.journal import ERROR, WARNING
from vmsilo_relay.listener import Listener
from vmsilo_relay.loop import READ, WRITE
from vmsilo_relay.packet import (
    Refusal,
    check_keys,
    close_fds,
    dismiss,
    encode_packet,
    parse_object,
    part,
    read_peer_uid,
    receive_packet,
    send_packet,
    take_int,
    take_str,
)
from vmsilo_relay.record import UID_MAX, check_generation, check_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from vmsilo_console.context import Context
    from vmsilo_console.table import Consoles

PACKET_MAX = 16 * 1024
FDS_MAX = 2
ID_MAX = 2**53  # what every JSON reader keeps exactly
REQUESTS_PER_WAKEUP = 16
SUBJECT = "consoled"


class ControlSocket:
    """Admits controllers; lives as long as the process."""

    def __init__(
        self, context: Context, table: Consoles, sock: socket.socket, admins: frozenset[int]
    ) -> None:
        self._context = context
        self._table = table
        self._admins = admins
        self._controllers: set[Controller] = set()
        self._listener = Listener(context, SUBJECT, sock, self._admit)

    def _admit(self, sock: socket.socket, _address: object) -> None:
        try:
            uid = read_peer_uid(sock)
            if uid not in self._admins:
                self._context.journal.log(WARNING, SUBJECT, f"uid {uid} denied at the control socket")
                raise Refusal("denied", "only vmsilod may give orders here")
            if len(self._controllers) >= self._context.limits.controllers:
                raise Refusal("busy", "too many control connections")
        except Refusal as refusal:
            dismiss(sock, refusal)
            return
        self._controllers.add(Controller(self._context, self._table, sock, self._controllers))


class Controller:
    def __init__(
        self, context: Context, table: Consoles, sock: socket.socket, controllers: set[Controller]
    ) -> None:
        self._context = context
        self._table = table
        self._sock = sock
        self._controllers = controllers
        self._queue: deque[bytes] = deque()
        self._closed = False
        self._watch(READ)

    def _watch(self, events: int) -> None:
        self._context.loop.watch(self._sock.fileno(), events, self._on_event, self._fail)

    def _on_event(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if not events & READ:
            return
        for _ in range(REQUESTS_PER_WAKEUP):
            if self._closed or not self._receive():
                return

    def _receive(self) -> bool:
        """Serve one packet; False when there is none."""
        try:
            packet, fds, truncated = receive_packet(self._sock, PACKET_MAX, FDS_MAX)
        except BlockingIOError:
            return False
        except OSError:
            self._close()
            return False
        try:
            if not packet:
                self._close()
                return False
            self._serve(packet, fds, truncated=truncated)
        finally:
            close_fds(fds)  # an order that takes them clears the list
        return True

    def _serve(self, packet: bytes, fds: list[int], *, truncated: bool) -> None:
        number: int | None = None
        try:
            request = parse_object(packet)
            number = take_int(request, "id", 0, ID_MAX)
            if truncated:
                raise Refusal("bad-request", "the packet is too long or has too many descriptors")
            op = ORDERS.get(take_str(request, "op", 32))
            if op is None:
                raise Refusal("bad-request", "no such op")
            reply = op(self, request, fds)
        except Refusal as refusal:
            self._send({"id": number, "error": refusal.to_json()})
            return
        self._send({"id": number, "ok": True, **reply})

    def _listen(self, request: dict[str, object], fds: list[int]) -> dict[str, object]:
        check_keys(request, ("id", "op", "name", "owner"))
        if len(fds) != 1:
            raise Refusal("bad-request", "one descriptor is needed")
        owner = take_int(request, "owner", 0, UID_MAX)
        self._table.listen(take_name(request), owner, fds[0])
        fds.clear()
        return {}

    def _open(self, request: dict[str, object], fds: list[int]) -> dict[str, object]:
        check_keys(request, ("id", "op", "name", "generation", "fds"))
        kinds = ["master", "journal"][: len(fds)]
        if not fds or request["fds"] != kinds:
            raise Refusal("bad-request", "fds must be master, or master and journal, and be attached")
        journal = fds[1] if len(fds) > 1 else None
        self._table.open(take_name(request), take_generation(request), fds[0], journal)
        fds.clear()
        return {}

    def _close_run(self, request: dict[str, object], _fds: list[int]) -> dict[str, object]:
        check_keys(request, ("id", "op", "name", "generation"))
        self._table.close(take_name(request), take_generation(request))
        return {}

    def _forget(self, request: dict[str, object], _fds: list[int]) -> dict[str, object]:
        check_keys(request, ("id", "op", "name"))
        self._table.forget(take_name(request))
        return {}

    def _list(self, request: dict[str, object], _fds: list[int]) -> dict[str, object]:
        check_keys(request, ("id", "op"))
        return {"vms": self._table.describe()}

    def _subscribe(self, request: dict[str, object], _fds: list[int]) -> dict[str, object]:
        """Answered for the sake of a controller that says it to the relay too; there are no events."""
        check_keys(request, ("id", "op"))
        return {}

    def _send(self, obj: dict[str, object]) -> None:
        if self._closed:
            return
        if len(self._queue) >= self._context.limits.controller_queue:
            self._context.journal.log(WARNING, SUBJECT, "a controller does not read, closing it")
            self._close()
            return
        self._queue.append(encode_packet(obj))
        if len(self._queue) == 1:
            self._flush()

    def _flush(self) -> None:
        while self._queue:
            try:
                sent = send_packet(self._sock, self._queue[0])
            except OSError:
                self._close()
                return
            if not sent:
                self._watch(READ | WRITE)
                return
            self._queue.popleft()
        self._watch(READ)

    def _fail(self, error: Exception) -> None:
        self._context.journal.log(ERROR, SUBJECT, f"serving a controller failed: {error!r}")
        self._close()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._controllers.discard(self)
        self._queue.clear()
        self._context.loop.forget(self._sock.fileno())
        part(self._sock)


ORDERS = {
    "listen": Controller._listen,
    "open": Controller._open,
    "close": Controller._close_run,
    "forget": Controller._forget,
    "list": Controller._list,
    "subscribe": Controller._subscribe,
}


def take_name(request: dict[str, object]) -> str:
    return check_name(take_str(request, "name", 31))


def take_generation(request: dict[str, object]) -> str:
    return check_generation(take_str(request, "generation", 128))
