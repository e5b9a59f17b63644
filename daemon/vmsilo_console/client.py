"""One connection to a VM's console: what a client may say, and what it is shown at its own pace.

A Client lives from accept until its end is told or it leaves. It keeps no output: it has a position in the
run's scroll-back, and one that is too slow is told how much it missed. Everything else that it is told is a
state, not a queue, so a client that does not read costs nothing but its place.
"""

from __future__ import annotations

import contextlib
import select
import socket

from vmsilo_relay.journal import ERROR, INFO
from vmsilo_relay.loop import READ, WRITE
from vmsilo_relay.packet import (
    Refusal,
    check_keys,
    encode_packet,
    parse_object,
    part,
    read_peer,
    send_packet,
)

from vmsilo_console.ring import CAPACITY, READ_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsilo_relay.loop import Timer

    from vmsilo_console.console import Console
    from vmsilo_console.context import Context
    from vmsilo_console.ring import Ring

INPUT_MAX = 4096
PACKETS_PER_WAKEUP = 16
SEND_BUFFER = 64 * 1024  # bounds what clients that do not read can hold of our memory
CATCH_UP = CAPACITY // 2  # where one that missed something goes on, so that it does not miss more at once
ASK, TAKE, NO = "ask", "take", "no"


def admit_client(context: Context, console: Console, sock: socket.socket) -> None:
    """Serve a new connection at the console of a VM, or refuse it."""
    try:
        pid, uid = read_peer(sock)
        if uid not in (0, console.owner):
            context.journal.log(INFO, console.name, f"uid {uid} denied at the console")
            raise Refusal("denied", f"{console.name} belongs to another user", "ask as its owner")
        if len(console.clients) >= context.limits.clients_per_vm:
            raise Refusal("busy", f"too many clients at the console of {console.name}", "end one of them")
    except Refusal as refusal:
        with contextlib.suppress(OSError):  # one that is gone or reads nothing is dismissed all the same
            send_packet(sock, encode_refusal(refusal))
        part(sock)
        return
    Client(context, console, sock, pid=pid, uid=uid).start()


class Client:
    def __init__(
        self, context: Context, console: Console, sock: socket.socket, *, pid: int, uid: int
    ) -> None:
        self._context = context
        self._console = console
        self._sock = sock
        self.pid = pid
        self.uid = uid
        self.write = NO
        self._attached = False
        self._ring: Ring | None = None
        self._position = 0
        self._history_end: int | None = None  # until H is sent
        self._shown: tuple[bool, int | None] | None = None
        self._corrected = False  # was told that it is not the writer
        self._reason = ""
        self._timer: Timer | None = None
        self._paused = False
        self._closed = False

    def start(self) -> None:
        self._console.clients.append(self)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._set_timer(self._context.limits.request_seconds)
        self._watch(READ)

    def show(self) -> None:
        """Send what this client has not got yet, as far as it takes it."""
        if not self._attached or self._closed:
            return
        try:
            if self._send_rest():
                if self._reason:
                    self._close()
                else:
                    self._watch(READ)
            else:
                self._watch(WRITE if self._reason else READ | WRITE)
        except OSError:
            self._close()

    def end(self, reason: str) -> None:
        """Nothing comes any more: close as soon as the rest is taken, or when the client takes nothing."""
        if self._reason or self._closed or (reason == "ended" and not self._attached):
            return  # one that has not said yet what it wants still gets the scroll-back
        self._reason = reason
        self._console.resign(self)
        self._paused = False
        self._set_timer(self._context.limits.answer_seconds)
        if not self._attached:
            self._attached = True
            self._shown = self._console.describe_writer(self)
        self.show()

    def pause(self) -> None:
        """The guest does not take the input: read none, but see when the client leaves."""
        if not self._paused and not self._reason:
            self._paused = True
            self._watch(READ)
            self._set_timer(self._context.limits.probe_seconds)

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            if self._timer is not None:
                self._timer.cancel()
            self._watch(READ | WRITE)  # WRITE: what it has not got is sent at the next turn

    def _watch(self, events: int) -> None:
        if self._closed:
            return
        if self._paused:
            events &= ~READ
        if events:
            self._context.loop.watch(self._sock.fileno(), events, self._on_event, self._fail)
        else:
            self._context.loop.forget(self._sock.fileno())

    def _on_event(self, events: int) -> None:
        if events & READ:
            for _ in range(PACKETS_PER_WAKEUP):
                if self._closed or self._paused or self._reason or not self._receive():
                    break
        if events & WRITE:
            self.show()

    def _receive(self) -> bool:
        """Serve one packet; False when there is none."""
        try:
            untrusted_packet = self._sock.recv(INPUT_MAX + 2)
        except BlockingIOError:
            return False
        except OSError:
            untrusted_packet = b""  # reset; the same as closed
        if not untrusted_packet:
            self._close()
            return False
        try:
            self._serve(untrusted_packet[:1], untrusted_packet[1:])
        except Refusal as refusal:
            self._refuse(refusal)
        except OSError:
            self._close()  # it is gone
        return True

    def _serve(self, kind: bytes, untrusted_body: bytes) -> None:
        if len(untrusted_body) > INPUT_MAX:
            raise Refusal("bad-request", f"a packet has at most {INPUT_MAX} bytes after its type")
        if not self._attached:
            if kind != b"A":
                raise Refusal("bad-request", "the first packet must be A")
            self._attach(untrusted_body)
        elif kind != b"I" or not untrusted_body:
            raise Refusal("bad-request", "after the first packet only input may come")
        elif self._console.writer is self:
            self._console.put_input(untrusted_body)
        elif not self._corrected:
            self._corrected = True
            self._shown = None
            self.show()

    def _attach(self, untrusted_body: bytes) -> None:
        history, self.write = parse_attach(untrusted_body)
        if self._timer is not None:
            self._timer.cancel()
        console = self._console
        console.choose_writer(self)
        self._attached = True
        self._shown = console.describe_writer(self)
        writer, pid = self._shown
        answer = {"vm": console.name, "running": console.running, "writer": writer, "writer_pid": pid}
        if not send_packet(self._sock, b"S" + encode_packet(answer)):
            raise OSError("no room for the first answer")
        ring = self._ring = console.ring
        self._history_end = 0
        if ring is not None:
            self._history_end = ring.total
            self._position = ring.find_history() if history else ring.total
        if console.running:
            self.show()
        else:
            self.end("stopped")

    def _send_rest(self) -> bool:
        """False if the client's queue is full. Raises OSError."""
        shown = self._console.describe_writer(self)
        if shown != self._shown and not self._reason:
            writer, pid = shown
            if not self._send(b"W" + encode_packet({"writer": writer, "writer_pid": pid})):
                return False
            if self._shown is not None:
                self._corrected = False
            self._shown = shown
        if not self._send_output():
            return False
        return not self._reason or self._send(b"E" + encode_packet({"reason": self._reason}))

    def _send_output(self) -> bool:
        ring = self._ring
        while ring is not None:
            if self._position < ring.oldest:
                resumed = ring.total - CATCH_UP
                if not self._send(b"L" + encode_packet({"lost": resumed - self._position})):
                    return False
                self._position = resumed
            if self._history_end is not None and self._position >= self._history_end:
                break
            limit = ring.total if self._history_end is None else self._history_end
            data = ring.read(self._position, min(READ_MAX, limit - self._position))
            if not data:
                break
            if not self._send(b"O" + data):
                return False
            self._position += len(data)
        if self._history_end is None:
            return True
        if not self._send(b"H"):
            return False
        self._history_end = None
        return self._send_output()

    def _send(self, packet: bytes) -> bool:
        sent = send_packet(self._sock, packet)
        if sent and self._reason:
            self._set_timer(self._context.limits.answer_seconds)
        return sent

    def _refuse(self, refusal: Refusal) -> None:
        with contextlib.suppress(OSError):  # as above
            send_packet(self._sock, encode_refusal(refusal))
        self._close()

    def _set_timer(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._context.loop.after(seconds, self._expire, self._fail)

    def _expire(self) -> None:
        if self._paused:
            poll = select.poll()
            poll.register(self._sock.fileno(), 0)
            if poll.poll(0):
                self._close()
            else:
                self._set_timer(self._context.limits.probe_seconds)
        elif self._reason:
            self._close()
        elif not self._attached:
            self._refuse(Refusal("timeout", "no request came"))

    def _fail(self, error: Exception) -> None:
        self._context.journal.log(ERROR, self._console.name, f"serving a client failed: {error!r}")
        self._close()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._context.loop.forget(self._sock.fileno())
        part(self._sock)
        self._ring = None
        self._console.leave(self)


def parse_attach(untrusted_body: bytes) -> tuple[bool, str]:
    """Whether the scroll-back is wanted, and how to write; raises Refusal."""
    request = parse_object(untrusted_body)
    check_keys(request, ("history", "write"))
    history, write = request["history"], request["write"]
    if not isinstance(history, bool):
        raise Refusal("bad-request", "history must be true or false")
    if write not in (ASK, TAKE, NO):
        raise Refusal("bad-request", f"write must be {ASK}, {TAKE} or {NO}")
    return history, str(write)


def encode_refusal(refusal: Refusal) -> bytes:
    return b"X" + encode_packet(refusal.to_json())
