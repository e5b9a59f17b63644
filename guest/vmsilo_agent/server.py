"""The listening socket, the connections' number, and what the connections share.

One per agent, made by `main`.  It knows nothing of frames beyond the refusal of a connection too many.
"""

import contextlib
import errno
import socket

from vmsilo_wire import HOST_CID
from vmsilo_wire.payload import encode_error

from vmsilo_agent.cgroup import CgroupTree
from vmsilo_agent.connection import Connection
from vmsilo_agent.forward import Forwards
from vmsilo_agent.loop import READ, Loop, log
from vmsilo_agent.process import run_quietly

CONNECTIONS_MAX = 512
UNAUTHENTICATED_MAX = 64
_BACKLOG = 128
_ACCEPT_BATCH = 32
_ACCEPT_PAUSE = 0.5  # seconds, when the system has no descriptors left


class Settings:
    """What the connections of an agent share; never changed after construction."""

    __slots__ = ("console", "nofile", "poweroff", "secret", "user")

    def __init__(
        self,
        *,
        secret: str,
        user: str,
        poweroff: tuple[str, ...],
        nofile: tuple[int, int],
        console: str = "",
    ) -> None:
        self.secret = secret
        self.user = user
        self.poweroff = poweroff
        self.nofile = nofile
        self.console = console


class Server:
    def __init__(
        self, loop: Loop, settings: Settings, tree: CgroupTree | None, listener: socket.socket
    ) -> None:
        self.loop = loop
        self.secret = settings.secret
        self.user = settings.user
        self.nofile = settings.nofile
        self.console = settings.console
        self.tree = tree
        self.forward = Forwards(loop).take
        self._poweroff = settings.poweroff
        self._listener = listener
        self._connections: set[Connection] = set()
        self._new: dict[Connection, None] = {}  # unauthenticated, oldest first
        listener.settimeout(0)
        listener.listen(_BACKLOG)
        loop.watch(listener.fileno(), READ, self._accept)

    def power_off(self) -> None:
        log("power-off requested by the host")
        try:
            run_quietly(self._poweroff, self.loop, self._powered_off)
        except OSError as exc:
            log(f"cannot run {self._poweroff[0]}: {exc.strerror}")

    def connection_authenticated(self, connection: Connection) -> None:
        self._new.pop(connection, None)

    def connection_closed(self, connection: Connection) -> None:
        self._new.pop(connection, None)
        self._connections.discard(connection)

    def _powered_off(self, status: int, _output: bytes) -> None:
        if status:
            log(f"{self._poweroff[0]} failed with status {status}")

    def _accept(self, _mask: int) -> None:
        for _ in range(_ACCEPT_BATCH):
            try:
                sock, peer = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
                    log(f"cannot accept for now: {exc.strerror}")
                    self.loop.forget(self._listener.fileno())
                    self.loop.call_later(_ACCEPT_PAUSE, self._accept_again)
                return  # else: the peer was gone before it was accepted
            if sock.family == socket.AF_VSOCK and peer[0] != HOST_CID:
                sock.close()  # a process of this guest, over the loopback transport
            else:
                self._admit(sock)

    def _accept_again(self) -> None:
        self.loop.watch(self._listener.fileno(), READ, self._accept)

    def _admit(self, sock: socket.socket) -> None:
        if len(self._new) >= UNAUTHENTICATED_MAX:
            next(iter(self._new)).close()
        if len(self._connections) >= CONNECTIONS_MAX:
            sock.settimeout(0)
            with contextlib.suppress(OSError):  # told or not, it is refused
                sock.send(encode_error("busy", f"the guest runs {CONNECTIONS_MAX} commands already"))
            sock.close()
            return
        connection = Connection(self, sock)
        self._connections.add(connection)
        self._new[connection] = None
