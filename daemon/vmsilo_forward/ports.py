"""The two kinds of forwards: a port of the host that leads into the guest, one of the guest that leads out.

Built once by `main`, one per configured forward. A HostPort is a listener; a GuestPort keeps a few
connections parked in the guest, on which it hears of the connections that are made there. What a GuestPort
connects to on the host is fixed here: nothing that the guest says has a part in it.
"""

from __future__ import annotations

import errno
import os
import socket

from vmsilo_relay.journal import ERROR
from vmsilo_relay.listener import Listener
from vmsilo_relay.loop import WRITE
from vmsilo_wire import ACCEPT, CONNECT, encode_forward
from vmsilo_wire.bridge import reset

from vmsilo_forward.opening import Opening

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsilo_relay.loop import Timer

    from vmsilo_forward.traffic import Traffic


class HostPort:
    """Every connection to `listener` becomes one to `port` of the guest."""

    def __init__(self, traffic: Traffic, listener: socket.socket, name: str, port: int) -> None:
        self._traffic = traffic
        self.name = name
        self.frame = encode_forward(CONNECT, port)
        self._waiting: set[HostConnection] = set()
        self._listener = Listener(traffic.context, traffic.name, listener, self._accept)

    def on_ready(self) -> None:
        for connection in tuple(self._waiting):
            connection.open()

    def _accept(self, plain: socket.socket, _address: object) -> None:
        if not self._traffic.enter(self.name):
            reset(plain)
            return
        connection = HostConnection(self._traffic, self, plain)
        self._waiting.add(connection)
        if self._traffic.link.ready:
            connection.open()

    def forget(self, connection: HostConnection) -> None:
        self._waiting.discard(connection)


class HostConnection:
    """From accept until it is bridged or refused."""

    def __init__(self, traffic: Traffic, port: HostPort, plain: socket.socket) -> None:
        self._traffic = traffic
        self._port = port
        self._plain = plain
        self._opening: Opening | None = None
        context = traffic.context
        self._timer = context.loop.after(context.limits.ready_seconds, self._expire, self._fail)

    def open(self) -> None:
        """The guest is ready."""
        self._port.forget(self)
        context = self._traffic.context
        self._timer.cancel()
        self._timer = context.loop.after(context.limits.open_seconds, self._expire, self._fail)
        self._opening = Opening(context, self._traffic.link, self._port.frame, self._opened)
        self._opening.start()

    def _opened(self, framed: socket.socket | None, reason: str) -> None:
        if framed is None:
            self._refuse(reason)
            return
        self._timer.cancel()
        self._traffic.copy(self._plain, framed, lambda: self._traffic.leave(self._port.name))

    def _refuse(self, reason: str) -> None:
        self._traffic.log(f"{self._port.name}: no connection to the guest: {reason}")
        self._timer.cancel()
        self._port.forget(self)
        if self._opening is not None:
            self._opening.cancel()
        reset(self._plain)
        self._traffic.leave(self._port.name)

    def _expire(self) -> None:
        self._refuse("it took too long" if self._opening else "the guest is not ready")

    def _fail(self, error: Exception) -> None:
        self._refuse(repr(error))


class GuestPort:
    """Every connection to `port` of the guest's loopback becomes one to `target`, an address of the host."""

    def __init__(self, traffic: Traffic, target: tuple[str, int], port: int) -> None:
        self._traffic = traffic
        self._target = target
        self.name = f"guest port {port}"
        self._frame = encode_forward(ACCEPT, port)
        self._parked: set[Opening] = set()
        self._pause = traffic.context.limits.park_first_seconds
        self._timer: Timer | None = None
        self._said = ""

    def on_ready(self) -> None:
        self._pause = self._traffic.context.limits.park_first_seconds
        self._park()

    def on_restart(self) -> None:
        """What is parked is parked in a guest, or with an agent, that is gone."""
        parked, self._parked = self._parked, set()
        for opening in parked:
            opening.cancel()
        if parked:
            self._park_later()

    def _park(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        context = self._traffic.context
        while self._traffic.link.ready and len(self._parked) < context.limits.parked:
            self._park_one()

    def _park_one(self) -> None:
        def done(framed: socket.socket | None, reason: str) -> None:
            self._parked.discard(opening)
            self._connected(framed, reason)

        opening = Opening(self._traffic.context, self._traffic.link, self._frame, done)
        self._parked.add(opening)
        opening.start()

    def _connected(self, framed: socket.socket | None, reason: str) -> None:
        """Somebody in the guest connected, or what was parked there broke."""
        if framed is None:
            if reason != self._said:
                self._traffic.log(f"{self.name} is not listened to: {reason}")
            self._said = reason
            self._park_later()
            return
        self._said = ""
        self._pause = self._traffic.context.limits.park_first_seconds
        self._park()
        if self._traffic.enter(self.name):
            HostDial(self._traffic, self, framed, self._target).start()
        else:
            framed.close()

    def _park_later(self) -> None:
        if self._timer is None:
            limits = self._traffic.context.limits
            self._timer = self._traffic.context.loop.after(self._pause, self._park, self._fail)
            self._pause = min(self._pause * 2, limits.park_most_seconds)

    def _fail(self, error: Exception) -> None:
        self._traffic.context.journal.log(ERROR, self._traffic.name, f"{self.name}: {error!r}")


class HostDial:
    """The connection to a service of the host, for a guest's connection that is there already."""

    def __init__(
        self, traffic: Traffic, port: GuestPort, framed: socket.socket, target: tuple[str, int]
    ) -> None:
        self._traffic = traffic
        self._port = port
        self._framed = framed
        self._target = target
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        self._plain = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._timer: Timer | None = None

    def start(self) -> None:
        try:
            problem = self._plain.connect_ex(self._target)
        except OSError as exc:  # the unit's address filter
            problem = exc.errno or errno.EACCES
        if problem != errno.EINPROGRESS:
            self._finish(problem)
            return
        context = self._traffic.context
        self._timer = context.loop.after(context.limits.host_seconds, self._expire, self._fail)
        context.loop.watch(self._plain.fileno(), WRITE, self._on_event, self._fail)

    def _on_event(self, _events: int) -> None:
        self._finish(self._plain.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _expire(self) -> None:
        self._finish(errno.ETIMEDOUT)

    def _finish(self, problem: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._traffic.context.loop.forget(self._plain.fileno())
        if not problem:
            self._traffic.copy(self._plain, self._framed, lambda: self._traffic.leave(self._port.name))
            return
        address, port = self._target
        self._traffic.log(f"{self._port.name}: {address} port {port}: {os.strerror(problem)}")
        self._plain.close()
        self._framed.close()
        self._traffic.leave(self._port.name)

    def _fail(self, error: Exception) -> None:
        self._traffic.log(f"{self._port.name}: {error!r}")
        self._finish(errno.EIO)
