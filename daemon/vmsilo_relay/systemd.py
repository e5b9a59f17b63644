"""systemd's side of relayd and consoled: inherited descriptors, the descriptor store, readiness, watchdog.

Written by hand because the systemd binding would cost more memory than the rest of the program. Called by
`main` and by the tables of VMs. Never blocks: notifications that the manager can't take at once are kept in
order.
"""

from __future__ import annotations

import os
import socket
from collections import deque

from vmsilo_relay.journal import ERROR
from vmsilo_relay.loop import WRITE
from vmsilo_relay.packet import send_packet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsilo_relay.journal import Journal
    from vmsilo_relay.loop import Loop

LISTEN_FDS_START = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)


def take_descriptors(environ: dict[str, str]) -> list[tuple[str, int]]:
    """Take the inherited descriptors with their names, and remove the variables that announce them."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    taken = []
    for index in range(int(count)):
        fd = LISTEN_FDS_START + index
        os.set_inheritable(fd, False)  # noqa: FBT003 positional-only
        taken.append((names[index] if index < len(names) else "", fd))
    return taken


def take_listen_fds(environ: dict[str, str]) -> list[tuple[str, socket.socket]]:
    """Take the inherited sockets with their names; what is no socket is closed."""
    taken = []
    for name, fd in take_descriptors(environ):
        try:
            taken.append((name, socket.socket(fileno=fd)))
        except OSError:
            os.close(fd)  # not a socket, so nothing that relayd ever stored
    return taken


class Notifier:
    """The notification socket; a Notifier without address (tests by hand) swallows everything."""

    def __init__(
        self, loop: Loop, journal: Journal, environ: dict[str, str], subject: str = "relayd"
    ) -> None:
        self._loop = loop
        self._subject = subject
        self._journal = journal
        self._queue: deque[tuple[bytes, int | None]] = deque()
        self._sock: socket.socket | None = None
        address = environ.get("NOTIFY_SOCKET", "")
        if address.startswith(("/", "@")):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            sock.settimeout(0)
            sock.connect("\0" + address[1:] if address[0] == "@" else address)
            self._sock = sock
        usec = environ.get("WATCHDOG_USEC", "")
        pid = environ.get("WATCHDOG_PID", str(os.getpid()))
        if self._sock is not None and usec.isdecimal() and int(usec) > 0 and pid == str(os.getpid()):
            self._interval = int(usec) / 2e6
            self._beat()

    def ready(self, status: str = "Relaying") -> None:
        self._send(b"READY=1\nSTATUS=" + status.encode())

    def store(self, name: str, fd: int) -> None:
        """Put `fd` into the descriptor store under `name`, replacing what is there."""
        self.drop(name)
        # FDPOLL=0: the manager is not to judge from poll events whether a descriptor is still of use.
        self._send(b"FDSTORE=1\nFDPOLL=0\nFDNAME=" + name.encode(), fd)

    def drop(self, name: str) -> None:
        self._send(b"FDSTOREREMOVE=1\nFDNAME=" + name.encode())

    def _beat(self) -> None:
        self._send(b"WATCHDOG=1")
        self._loop.after(self._interval, self._beat, self._fail)

    def _send(self, message: bytes, fd: int | None = None) -> None:
        if self._sock is None:
            return
        if self._queue or not self._deliver(self._sock, message, fd):
            self._queue.append((message, None if fd is None else os.dup(fd)))
            self._loop.watch(self._sock.fileno(), WRITE, self._flush, self._fail)

    def _deliver(self, sock: socket.socket, message: bytes, fd: int | None) -> bool:
        try:
            return send_packet(sock, message, fd)
        except OSError as error:
            self._journal.log(ERROR, self._subject, f"systemd did not take {message!r}: {error}")
            return True

    def _flush(self, _events: int) -> None:
        assert self._sock is not None
        while self._queue:
            message, fd = self._queue[0]
            if not self._deliver(self._sock, message, fd):
                return
            self._queue.popleft()
            if fd is not None:
                os.close(fd)
        self._loop.forget(self._sock.fileno())

    def _fail(self, error: Exception) -> None:
        self._journal.log(ERROR, self._subject, f"notifying systemd failed: {error!r}")
