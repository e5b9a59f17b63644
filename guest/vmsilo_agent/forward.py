"""Forwards: TCP connections of the guest's loopback whose other end is on the host.

One `Forwards` per agent, made by the server, which hands it the sockets of connections that asked for
CONNECT or ACCEPT and so became forwards. All of them were opened by the host. With ACCEPT a connection waits
here, parked, until somebody in the guest connects to its port; the port is listened to as long as the host
has connections waiting for it, and a little longer. Nothing but 127.0.0.1 is ever connected or listened to.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Callable

from vmsilo_wire import CONNECT, CONNECTED, encode_frame
from vmsilo_wire.bridge import Bridge, reset
from vmsilo_wire.payload import encode_error

from vmsilo_agent.loop import READ, WRITE, Loop, Timer

FORWARDS_MAX = 400
LOOPBACK = "127.0.0.1"
_CONNECT_SECONDS = 10.0
_LINGER = 10.0  # seconds that the host has to close after DONE
_PORT_LINGER = 10.0  # seconds that a port is listened to without a connection that waits for it
_BACKLOG = 128


class Forwards:
    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._ports: dict[int, GuestPort] = {}
        self._count = 0

    def take(self, kind: int, port: int, framed: socket.socket) -> None:
        """A connection that is from now on a forward to, or from, this port."""
        if self._count >= FORWARDS_MAX:
            _refuse(framed, "busy", f"the guest has {FORWARDS_MAX} forwarded connections already")
        elif kind == CONNECT:
            self._connect(port, framed)
        else:
            self._park(port, framed)

    def enter(self) -> None:
        self._count += 1

    def leave(self) -> None:
        self._count -= 1

    def bridge(self, plain: socket.socket, framed: socket.socket) -> bool:
        """Tells the host that there is a connection, and copies; False, with nothing but `framed` closed,
        where the host is gone. `enter` was called for it.
        """
        try:
            framed.settimeout(0)
            framed.send(encode_frame(CONNECTED))  # five bytes, for which a new connection has room
        except OSError:
            framed.close()
            self.leave()
            return False
        Forward(self._loop, plain, framed, self.leave)
        return True

    def _connect(self, port: int, framed: socket.socket) -> None:
        plain = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        plain.settimeout(0)
        problem = plain.connect_ex((LOOPBACK, port))
        self.enter()
        if problem and problem != errno.EINPROGRESS:
            self._connected(plain, framed, port, problem)
            return
        over = self._loop.call_later(
            _CONNECT_SECONDS, lambda: self._connected(plain, framed, port, errno.ETIMEDOUT)
        )

        def ready(_mask: int) -> None:
            over.cancel()
            self._connected(plain, framed, port, plain.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

        self._loop.watch(plain.fileno(), WRITE, ready)

    def _connected(self, plain: socket.socket, framed: socket.socket, port: int, problem: int) -> None:
        self._loop.forget(plain.fileno())
        if problem:
            plain.close()
            self.leave()
            _refuse(framed, "failed", f"port {port} of the guest: {os.strerror(problem)}")
        elif not self.bridge(plain, framed):
            plain.close()

    def _park(self, port: int, framed: socket.socket) -> None:
        found = self._ports.get(port)
        if found is None:
            try:
                found = GuestPort(self._loop, port, self, lambda: self._ports.pop(port))
            except OSError as exc:
                _refuse(framed, "failed", f"port {port} of the guest: {exc.strerror}")
                return
            self._ports[port] = found
        found.park(framed)


class GuestPort:
    """One port that programs of the guest may connect to, and the host's connections that wait for them."""

    def __init__(self, loop: Loop, port: int, forwards: Forwards, closed: Callable[[], object]) -> None:
        """Raises OSError where the port cannot be listened to."""
        self._loop = loop
        self._forwards = forwards
        self._closed = closed
        self._parked: list[socket.socket] = []
        self._timer: Timer | None = None
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((LOOPBACK, port))
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
        listener.settimeout(0)
        self._listener = listener

    def park(self, framed: socket.socket) -> None:
        self._forwards.enter()
        self._parked.append(framed)
        # The host says nothing before it is told of a connection: whatever comes is its end.
        self._loop.watch(framed.fileno(), READ, lambda _mask: self._drop(framed))
        self._rest_or_listen()

    def _drop(self, framed: socket.socket) -> None:
        self._unpark(framed)
        framed.close()
        self._forwards.leave()
        self._rest_or_listen()

    def _unpark(self, framed: socket.socket) -> None:
        self._parked.remove(framed)
        self._loop.forget(framed.fileno())

    def _rest_or_listen(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._parked:
            self._loop.watch(self._listener.fileno(), READ, self._accept)
        else:  # who connects now waits in the kernel's queue
            self._loop.forget(self._listener.fileno())
            self._timer = self._loop.call_later(_PORT_LINGER, self._close)

    def _accept(self, _mask: int) -> None:
        # The newest: an old one may be of a host that is gone without a word. One whose end came already,
        # but whose turn in the loop did not, would cost the guest's program its connection.
        while self._parked and not _is_silent(self._parked[-1]):
            self._drop(self._parked[-1])
        if not self._parked:
            return
        try:
            plain, _peer = self._listener.accept()
        except OSError:  # it gave up, or descriptors ran out: then the host's are released first
            return
        taken = False
        while self._parked and not taken:
            framed = self._parked[-1]
            self._unpark(framed)
            taken = self._forwards.bridge(plain, framed)
        if not taken:
            reset(plain)
        self._rest_or_listen()

    def _close(self) -> None:
        self._listener.close()
        self._closed()


class Forward:
    """A bridge on the agent's loop."""

    def __init__(
        self, loop: Loop, plain: socket.socket, framed: socket.socket, left: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._left = left
        self._timer: Timer | None = None
        self._bridge = Bridge(plain, framed, self._watch, self._ended, in_guest=True)
        self._bridge.start()

    def _watch(self, sock: socket.socket, read: bool, write: bool) -> None:  # noqa: FBT001 as Bridge calls it
        call = self._on_plain if sock is self._bridge.plain else self._on_framed
        self._loop.watch(sock.fileno(), (READ if read else 0) | (WRITE if write else 0), call)

    def _on_plain(self, mask: int) -> None:
        self._bridge.on_plain(readable=bool(mask & ~WRITE), writable=mask != READ)
        self._await_close()

    def _on_framed(self, mask: int) -> None:
        self._bridge.on_framed(readable=bool(mask & ~WRITE), writable=mask != READ)
        self._await_close()

    def _await_close(self) -> None:
        if self._bridge.finished and self._timer is None:
            self._timer = self._loop.call_later(_LINGER, lambda: self._bridge.close(""))

    def _ended(self, _reason: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._left()


def _is_silent(framed: socket.socket) -> bool:
    try:
        framed.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _refuse(framed: socket.socket, code: str, message: str) -> None:
    with contextlib.suppress(OSError):  # told or not, it is refused
        framed.settimeout(0)
        framed.send(encode_error(code, message))
    framed.close()
