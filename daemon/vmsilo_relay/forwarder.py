"""The relay's end of the socket by which a VM's forwarder asks for connections to that VM's agent.

vmsilod brings it (order `forward`), one per VM, and it ends with the VM, with the forwarder, or when another
comes. The forwarder copies what guests and strangers send, so it is believed nothing: whatever it asks, it
gets connections to its own VM, for the role that may only forward, at a bounded rate, and never the secret.
A connection that was handed over does not end with this link.
"""

from __future__ import annotations

import time

from vmsilo_relay.errand import Errand
from vmsilo_relay.journal import ERROR
from vmsilo_relay.loop import READ
from vmsilo_relay.packet import (
    Refusal,
    check_keys,
    encode_packet,
    parse_object,
    part,
    send_packet,
    take_int,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from vmsilo_relay.context import Context
    from vmsilo_relay.loop import Timer
    from vmsilo_relay.vm import Vm

REQUEST_MAX = 128
ID_MAX = 2**53
# In forward_pause_seconds: 400 connections in a second, each of which costs the relay a fraction of a
# millisecond, so that a flood at one VM's ports leaves the others their share.
REQUESTS_PER_TURN = 8
DIALS_MAX = 64


class ForwarderLink:
    """`{"id":N}` is answered by the same with a descriptor, or with an error; `{"ready":BOOL}` and
    `{"restarted":true}` (the guest's agent began anew) are told.
    """

    def __init__(self, context: Context, vm: Vm, sock: socket.socket) -> None:
        self._context = context
        self._vm = vm
        self._sock = sock
        self._dials: dict[Errand, int] = {}
        self._pause: Timer | None = None
        self._closed = False
        self._told: bool | None = None
        self._since = 0.0
        self._count = 0  # requests since then

    def start(self) -> None:
        before, self._vm.forwarder = self._vm.forwarder, self
        if before is not None:
            before.close()
        self._sock.settimeout(0)
        self._vm.clients.add(self)
        self._resume()
        self.on_change()

    def on_change(self) -> None:
        if self._told != self._vm.ready:
            self._told = self._vm.ready
            self._send({"ready": self._told})

    def tell_restart(self) -> None:
        self._send({"restarted": True})

    def refuse(self, _code: str, _message: str, _hint: str = "") -> None:
        self.close()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._vm.clients.discard(self)
        if self._vm.forwarder is self:
            self._vm.forwarder = None
        if self._pause is not None:
            self._pause.cancel()
        for errand in tuple(self._dials):
            errand.cancel()
        self._dials.clear()
        self._context.loop.forget(self._sock.fileno())
        part(self._sock)

    def _resume(self) -> None:
        self._pause = None
        self._context.loop.watch(self._sock.fileno(), READ, self._on_event, self._fail)

    def _on_event(self, _events: int) -> None:
        while not self._closed:
            now = time.monotonic()
            if now - self._since >= self._context.limits.forward_pause_seconds:
                self._since, self._count = now, 0
            if self._count >= REQUESTS_PER_TURN or len(self._dials) >= DIALS_MAX:
                self._rest()
                return
            self._count += 1
            try:
                untrusted_packet = self._sock.recv(REQUEST_MAX)
            except BlockingIOError:
                return
            except OSError:
                untrusted_packet = b""
            if not untrusted_packet:
                self.close()
                return
            self._dial(untrusted_packet)

    def _rest(self) -> None:
        loop = self._context.loop
        loop.forget(self._sock.fileno())
        self._pause = loop.after(self._context.limits.forward_pause_seconds, self._resume, self._fail)

    def _dial(self, untrusted_packet: bytes) -> None:
        try:
            request = parse_object(untrusted_packet)
            check_keys(request, ("id",))
            number = take_int(request, "id", 0, ID_MAX)
        except Refusal as refusal:
            self._context.journal.log(ERROR, self._vm.name, f"the forwarder is let go: {refusal.message}")
            self.close()
            return
        errand = Errand(self._context, self._vm, self._vm.hello("forward"), self._on_outcome)
        self._dials[errand] = number
        errand.start()

    def _on_outcome(self, errand: Errand, refusal: Refusal | None, agent: socket.socket | None) -> None:
        number = self._dials.pop(errand)
        if refusal is not None:
            self._send({"id": number, "error": refusal.to_json()})
        else:
            self._send({"id": number}, agent)
        if agent is not None:
            agent.close()

    def _send(self, obj: dict[str, object], agent: socket.socket | None = None) -> None:
        if self._closed:
            return
        try:
            sent = send_packet(self._sock, encode_packet(obj), None if agent is None else agent.fileno())
        except OSError:
            sent = False
        if not sent:  # gone, or it does not read the few answers that can be on their way
            self.close()

    def _fail(self, error: Exception) -> None:
        self._context.journal.log(ERROR, self._vm.name, f"serving the forwarder failed: {error!r}")
        self.close()
