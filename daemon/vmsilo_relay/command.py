"""The command sockets: a local client asks for a connection to its VM's guest agent and gets the descriptor.

A CommandClient lives from accept until its one answer is sent. Decides
who may connect (the kernel's word on the peer's uid), never what is run: that passes between client and
agent directly.
"""

from __future__ import annotations

import socket

from vmsilo_relay.dial import Dial
from vmsilo_relay.journal import ERROR, INFO
from vmsilo_relay.loop import READ, WRITE
from vmsilo_relay.packet import (
    Refusal,
    check_keys,
    dismiss,
    encode_packet,
    parse_object,
    part,
    read_peer_uid,
    send_packet,
)
from vmsilo_relay.record import WAIT_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsilo_relay.context import Context
    from vmsilo_relay.loop import Timer
    from vmsilo_relay.vm import Vm

REQUEST_MAX = 4096
SEND_BUFFER = 8192  # bounds what clients that do not read can hold of our memory


def admit_client(context: Context, vm: Vm, sock: socket.socket) -> None:
    """Serve a new connection at the command socket of `vm`, or refuse it."""
    try:
        uid = read_peer_uid(sock)
        if uid not in (0, vm.record.owner):
            context.journal.log(INFO, vm.name, f"uid {uid} denied at the command socket")
            raise Refusal("denied", f"{vm.name} belongs to another user", "run the command as its owner")
        if len(vm.clients) >= context.limits.clients_per_vm:
            raise Refusal("busy", f"too many connections to {vm.name}", "try again later")
    except Refusal as refusal:
        dismiss(sock, refusal)
    else:
        CommandClient(context, vm, sock).start()


class CommandClient:
    """Asks, waits for the VM, waits for the agent, gets the answer; `_close` ends it at any point."""

    def __init__(self, context: Context, vm: Vm, sock: socket.socket) -> None:
        self._context = context
        self._vm = vm
        self._sock = sock
        self._asked = False
        self._wait = 0.0  # seconds that it waits for the VM in all
        self._last: tuple[bytes, socket.socket | None] | None = None
        self._dial: Dial | None = None
        self._timer: Timer | None = None
        self._closed = False

    def start(self) -> None:
        self._vm.clients.add(self)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._set_timer(self._context.limits.request_seconds)
        try:
            self._on_event(READ)  # most clients have written by now
        except Exception as error:
            self._fail(error)
        if not self._closed and self._last is None:
            self._context.loop.watch(self._sock.fileno(), READ, self._on_event, self._fail)

    def on_change(self) -> None:
        """The VM's state changed."""
        if not self._asked or self._dial is not None or self._last is not None:
            return
        if self._vm.ready:
            if self._timer is not None:
                self._timer.cancel()
            hello = self._vm.hello("user")
            self._dial = Dial(self._context, self._vm.record.channel, hello, self._on_dialled)
            self._dial.start()
            return
        try:
            # A client that does not read misses a text; the next one replaces it anyway.
            packet = {"state": "booting", "text": self._vm.record.status, "wait": self._wait}
            send_packet(self._sock, encode_packet(packet))
        except OSError:
            self._close()

    def refuse(self, code: str, message: str, hint: str = "") -> None:
        refusal = Refusal(code, message, hint)
        self._answer(encode_packet({"error": refusal.to_json()}), None)

    def _on_event(self, _events: int) -> None:
        try:
            untrusted_packet = self._sock.recv(REQUEST_MAX + 1)
        except BlockingIOError:
            return
        except OSError:
            untrusted_packet = b""  # reset; the same as closed
        if not untrusted_packet:
            self._close()
            return
        try:
            if self._asked:
                raise Refusal("bad-request", "one request per connection")
            self._wait = parse_request(untrusted_packet, self._vm.record.start_timeout)
        except Refusal as refusal:
            self.refuse(refusal.code, refusal.message)
            return
        self._asked = True
        self._set_timer(self._wait)
        self.on_change()

    def _on_dialled(self, agent: socket.socket | None, reason: str) -> None:
        self._dial = None
        if agent is None:
            name = self._vm.name
            self._context.journal.log(INFO, name, f"agent unreachable: {reason}")
            self.refuse("agent-unreachable", f"the agent of {name} can't be reached: {reason}")
            return
        self._answer(encode_packet({"ok": True}), agent)

    def _answer(self, packet: bytes, agent: socket.socket | None) -> None:
        """Send the last packet, now or as soon as the client has room for it, and end."""
        if self._closed or self._last is not None:
            if agent is not None:
                agent.close()
            return
        if self._dial is not None:
            self._dial.cancel()
            self._dial = None
        self._last = (packet, agent)
        self._set_timer(self._context.limits.answer_seconds)
        self._send_last(WRITE)

    def _send_last(self, _events: int) -> None:
        assert self._last is not None
        packet, agent = self._last
        try:
            sent = send_packet(self._sock, packet, None if agent is None else agent.fileno())
        except OSError:
            sent = True  # the client is gone, or took too many descriptors without reading them
        if sent:
            self._close()
        else:
            self._context.loop.watch(self._sock.fileno(), WRITE, self._send_last, self._fail)

    def _set_timer(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._context.loop.after(seconds, self._expire, self._fail)

    def _expire(self) -> None:
        if self._last is not None:
            self._close()
        elif self._asked:
            hint = f"see: journalctl -u vmsilo-{self._vm.name}-vm.service"
            self.refuse("timeout", f"{self._vm.name} did not get ready in time", hint)
        else:
            self.refuse("timeout", "no request came")

    def _fail(self, error: Exception) -> None:
        self._context.journal.log(ERROR, self._vm.name, f"serving a client failed: {error!r}")
        self._close()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._vm.clients.discard(self)
        last, self._last = self._last, None
        if last is not None and last[1] is not None:
            last[1].close()
        if self._dial is not None:
            self._dial.cancel()
            self._dial = None
        if self._timer is not None:
            self._timer.cancel()
        self._context.loop.forget(self._sock.fileno())
        part(self._sock)


def parse_request(untrusted_packet: bytes, default: int) -> float:
    """The seconds that the client is willing to wait, `default` if it does not say; raises Refusal."""
    if len(untrusted_packet) > REQUEST_MAX:
        raise Refusal("bad-request", f"a request has at most {REQUEST_MAX} bytes")
    request = parse_object(untrusted_packet)
    check_keys(request, ("v", "op", "wait"))
    if isinstance(request["v"], bool) or request["v"] != 1:
        raise Refusal("bad-request", "this relay speaks version 1")
    if request["op"] != "connect":
        raise Refusal("bad-request", "op must be connect")
    wait = request["wait"]
    if wait is None:
        return float(default)
    if isinstance(wait, bool) or not isinstance(wait, int | float) or not 0 <= wait <= WAIT_MAX:
        raise Refusal("bad-request", f"wait must be null or a number from 0 to {WAIT_MAX}")
    return float(wait)
