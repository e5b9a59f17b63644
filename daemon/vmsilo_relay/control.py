"""relay.sock: vmsilod's orders to relayd and the events it subscribed to.

A Controller is one connection, from accept until it closes or breaks the rules; several orders of one may be
under way at once. Only root (and the uid of --admin-uid) is admitted, by the kernel's word.
"""

from __future__ import annotations

import base64
import binascii
import socket
from collections import deque

from vmsilo_wire import ROLES

from vmsilo_relay.errand import POWEROFF_FRAME, Errand
from vmsilo_relay.forwarder import ForwarderLink
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
from vmsilo_relay.record import ADD_KEYS, OPTIONAL_KEYS, check_generation, check_name, parse_record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsilo_relay.context import Context
    from vmsilo_relay.relay import Relay
    from vmsilo_relay.vm import Vm

PACKET_MAX = 256 * 1024  # above what a default send buffer lets through
FDS_MAX = 4
ID_MAX = 2**53  # what every JSON reader keeps exactly
REQUESTS_PER_WAKEUP = 16
ERRANDS_MAX = 256
DIAL_PORTS = frozenset({22})  # the guest's sshd


class ControlSocket:
    """Admits controllers; lives as long as the process."""

    def __init__(self, context: Context, relay: Relay, sock: socket.socket, admins: frozenset[int]) -> None:
        self._context = context
        self._relay = relay
        self._admins = admins
        self._controllers: set[Controller] = set()
        self._listener = Listener(context, "relayd", sock, self._admit)

    def _admit(self, sock: socket.socket, _address: object) -> None:
        try:
            uid = read_peer_uid(sock)
            if uid not in self._admins:
                self._context.journal.log(WARNING, "relayd", f"uid {uid} denied at the control socket")
                raise Refusal("denied", "only vmsilod may give orders here")
            if len(self._controllers) >= self._context.limits.controllers:
                raise Refusal("busy", "too many control connections")
        except Refusal as refusal:
            dismiss(sock, refusal)
            return
        self._controllers.add(Controller(self._context, self._relay, sock, self._controllers))


class Controller:
    def __init__(
        self, context: Context, relay: Relay, sock: socket.socket, controllers: set[Controller]
    ) -> None:
        self._context = context
        self._relay = relay
        self._sock = sock
        self._controllers = controllers
        self._queue: deque[tuple[bytes, socket.socket | None]] = deque()
        self._errands: dict[Errand, int] = {}
        self._blocked = False  # the peer's queue is full
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
            close_fds(fds)  # an order that takes one removes it from the list
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
        if reply is not None:
            self._send({"id": number, "ok": True, **reply})

    def _add(self, request: dict[str, object], fds: list[int]) -> dict[str, object]:
        check_keys(request, ("id", "op", *ADD_KEYS), OPTIONAL_KEYS)
        record = parse_record(request)
        if len(record.fds) != len(fds):
            raise Refusal("bad-request", f"{len(record.fds)} descriptors announced, {len(fds)} attached")
        listeners = dict(zip(record.fds, take_sockets(fds), strict=True))
        try:
            self._relay.add(record, listeners)
        except BaseException:
            for sock in listeners.values():
                sock.close()
            raise
        return {}

    def _listen_vsock(self, request: dict[str, object], fds: list[int]) -> dict[str, object]:
        check_keys(request, ("id", "op"))
        if len(fds) != 1:
            raise Refusal("bad-request", "one descriptor is needed")
        sock = take_sockets(fds)[0]
        try:
            self._relay.listen_vsock(sock)
        except BaseException:
            sock.close()
            raise
        return {}

    def _remove(self, request: dict[str, object], _fds: list[int]) -> dict[str, object]:
        check_keys(request, ("id", "op", "name", "generation"))
        name = check_name(take_str(request, "name", 31))
        self._relay.remove(name, check_generation(take_str(request, "generation", 128)))
        return {}

    def _forward(self, request: dict[str, object], fds: list[int]) -> dict[str, object]:
        """The socket by which the VM's forwarder asks for connections; it replaces the one before."""
        check_keys(request, ("id", "op", "name", "generation"))
        vm = self._take_vm(request)
        if vm.record.generation != check_generation(take_str(request, "generation", 128)):
            raise Refusal("not-found", f"{vm.name} is of another generation")
        if len(fds) != 1:
            raise Refusal("bad-request", "one descriptor is needed")
        ForwarderLink(self._context, vm, take_sockets(fds)[0]).start()
        return {}

    def _list(self, request: dict[str, object], _fds: list[int]) -> dict[str, object]:
        check_keys(request, ("id", "op"))
        vms = [
            {
                "name": vm.name,
                "generation": vm.record.generation,
                "ready": vm.ready,
                "agent": vm.record.agent,
                "status": vm.record.status,
            }
            for vm in self._relay.vms.values()
        ]
        return {"vms": vms, "listening_vsock": self._relay.vsock is not None}

    def _subscribe(self, request: dict[str, object], _fds: list[int]) -> dict[str, object]:
        check_keys(request, ("id", "op"))
        self._relay.subscribers.add(self._send)
        return {}

    def _connect(self, request: dict[str, object], _fds: list[int]) -> None:
        check_keys(request, ("id", "op", "name", "role"), ("first",))
        vm = self._take_vm(request)
        role = take_str(request, "role", 16)
        if role not in ROLES:
            raise Refusal("bad-request", f"role must be one of {', '.join(ROLES)}")
        first = b""
        if "first" in request:
            try:
                first = base64.b64decode(take_str(request, "first", PACKET_MAX), validate=True)
            except (binascii.Error, ValueError) as exc:
                raise Refusal("bad-request", "first is not base64") from exc
        self._start(Errand(self._context, vm, vm.hello(role) + first, self._on_outcome), request)

    def _dial(self, request: dict[str, object], _fds: list[int]) -> None:
        """A connection on which nothing was said, to one of the few ports that are not the agent's."""
        check_keys(request, ("id", "op", "name", "port"))
        vm = self._take_vm(request)
        port = take_int(request, "port", 1, 2**32 - 2)
        if port not in DIAL_PORTS:
            raise Refusal("bad-request", f"port {port} is not one that is dialled")
        self._start(Errand(self._context, vm, b"", self._on_outcome, port=port), request)

    def _poweroff(self, request: dict[str, object], _fds: list[int]) -> None:
        check_keys(request, ("id", "op", "name"))
        vm = self._take_vm(request)
        if not vm.record.agent:
            raise Refusal("agent-unreachable", f"the agent of {vm.name} has not come up yet")
        errand = Errand(self._context, vm, vm.hello("control") + POWEROFF_FRAME, self._on_outcome)
        errand.waits = True
        self._start(errand, request)

    def _take_vm(self, request: dict[str, object]) -> Vm:
        name = check_name(take_str(request, "name", 31))
        vm = self._relay.vms.get(name)
        if vm is None:
            raise Refusal("not-found", f"{name} is not running")
        return vm

    def _start(self, errand: Errand, request: dict[str, object]) -> None:
        if len(self._errands) >= ERRANDS_MAX:
            raise Refusal("busy", "too many orders under way")
        self._errands[errand] = take_int(request, "id", 0, ID_MAX)
        errand.start()

    def _on_outcome(self, errand: Errand, refusal: Refusal | None, agent: socket.socket | None) -> None:
        number = self._errands.pop(errand)
        if refusal is not None:
            self._send({"id": number, "error": refusal.to_json()})
        else:
            self._send({"id": number, "ok": True}, agent)

    def _send(self, obj: dict[str, object], agent: socket.socket | None = None) -> None:
        if self._closed or len(self._queue) >= self._context.limits.controller_queue:
            if agent is not None:
                agent.close()
            if not self._closed:
                self._context.journal.log(WARNING, "relayd", "a controller does not read, closing it")
                self._close()
            return
        self._queue.append((encode_packet(obj), agent))
        if len(self._queue) == 1:
            self._flush()

    def _flush(self) -> None:
        while self._queue:
            packet, agent = self._queue[0]
            try:
                sent = send_packet(self._sock, packet, None if agent is None else agent.fileno())
            except OSError:
                self._close()
                return
            if not sent:
                self._blocked = True
                self._watch(READ | WRITE)
                return
            self._queue.popleft()
            if agent is not None:
                agent.close()
        if self._blocked:
            self._blocked = False
            self._watch(READ)

    def _fail(self, error: Exception) -> None:
        self._context.journal.log(ERROR, "relayd", f"serving a controller failed: {error!r}")
        self._close()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._controllers.discard(self)
        self._relay.subscribers.discard(self._send)
        for errand in tuple(self._errands):
            errand.cancel()
        self._errands.clear()
        for _packet, agent in self._queue:
            if agent is not None:
                agent.close()
        self._queue.clear()
        self._context.loop.forget(self._sock.fileno())
        part(self._sock)


ORDERS = {
    "add": Controller._add,
    "listen-vsock": Controller._listen_vsock,
    "remove": Controller._remove,
    "forward": Controller._forward,
    "list": Controller._list,
    "subscribe": Controller._subscribe,
    "connect": Controller._connect,
    "dial": Controller._dial,
    "poweroff": Controller._poweroff,
}


def take_sockets(fds: list[int]) -> list[socket.socket]:
    """Turn all descriptors into sockets, taking them off the list; raises Refusal and then takes none."""
    for fd in fds:
        try:
            socket.socket(fileno=fd).detach()
        except OSError as exc:
            raise Refusal("bad-request", "an attached descriptor is not a socket") from exc
    sockets = [socket.socket(fileno=fd) for fd in fds]
    fds.clear()
    return sockets
