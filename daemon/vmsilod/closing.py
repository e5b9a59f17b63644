"""Closes the descriptors of others, away from the loop: a close takes as long as who made the file likes.

It waits for a socket's unsent data (SO_LINGER) and for a FUSE server's answer to the flush, and a socket
brings more of both in what nobody has received from it. Used by the bus and the control socket with an
owner: the uid or the unit that the descriptors came from. Each owner with something to close has a thread,
so that nobody waits for the files of others, and a count, so that its next descriptors can be refused. The
threads do not hold up the end of the process. Lives as long as the process.
"""

from __future__ import annotations

import array
import ctypes
import logging
import os
import socket
import struct
import threading
from collections import Counter, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

log = logging.getLogger(__name__)

Owner = int | str

DESCRIPTORS_MAX = 64
THREADS_MAX = 256
PACKET_FDS_MAX = 253  # unix(7), SCM_MAX_FD
_NO_LINGER = struct.pack("ii", 0, 0)  # socket(7): l_onoff, l_linger
# Not socket.setsockopt: it keeps the interpreter's lock, and the kernel waits here for a sender of the
# socket, who can stand still for ever in a page of memory that a file server of his has to bring.
_setsockopt = ctypes.CDLL(None).setsockopt
_setsockopt.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]


class Closers:
    """`limit` descriptors of an owner are accepted at a time; `threads` owners have a thread at a time."""

    def __init__(self, limit: int = DESCRIPTORS_MAX, threads: int = THREADS_MAX) -> None:
        self._limit = limit
        self._threads = threads
        self._lock = threading.Lock()
        self._unclosed: Counter[Owner] = Counter()
        self._queues: dict[Owner, deque[int | socket.socket]] = {}
        self._served: set[Owner] = set()

    def receive(self, owner: Owner, count: int) -> bool:
        """Count what came, until it is closed; False if the owner has too many with these."""
        if not count:
            return True
        with self._lock:
            self._unclosed[owner] += count
            return self._unclosed[owner] <= self._limit

    def close(self, owner: Owner, received: Sequence[int | socket.socket]) -> None:
        """Close what `receive` has counted; never waits. Of a socket.socket, its packets are closed too."""
        if not received:
            return
        with self._lock:
            self._queues.setdefault(owner, deque()).extend(received)
            if owner in self._served or len(self._served) >= self._threads:
                return
            self._served.add(owner)
        try:
            threading.Thread(target=self._serve, args=(owner,), name="vmsilod-closer", daemon=True).start()
        except RuntimeError as error:
            log.error("no thread to close descriptors, trying again with the next: %s", error)
            with self._lock:
                self._served.discard(owner)

    def _serve(self, owner: Owner) -> None:
        """The owner's queue to its end, then that of any who waits for a thread."""
        while True:
            with self._lock:
                queue = self._queues.get(owner)
                if not queue:
                    self._queues.pop(owner, None)
                    self._served.discard(owner)
                    waiting = next((other for other in self._queues if other not in self._served), None)
                    if waiting is None:
                        return
                    self._served.add(waiting)
                    owner = waiting
                    continue
                item = queue.popleft()
            _close(item)
            del item
            with self._lock:
                self._unclosed[owner] -= 1
                if not self._unclosed[owner]:
                    del self._unclosed[owner]


_closers = Closers()
receive = _closers.receive
close_received = _closers.close


def close_later(owner: Owner, uncounted: Iterable[int | socket.socket]) -> None:
    """Close what `receive` was not told of: duplicates, connections, what was refused unseen."""
    listed = list(uncounted)
    receive(owner, len(listed))
    close_received(owner, listed)


def _close(item: int | socket.socket) -> None:
    try:
        if isinstance(item, socket.socket):
            _empty(item)
            item = item.detach()
        _setsockopt(item, socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER, len(_NO_LINGER))  # or fails
        os.close(item)
    except OSError as error:
        # The descriptor is gone all the same: what failed is to write what its file still had to write.
        log.debug("ignoring: a descriptor of others closed with %s", error.strerror)


def _empty(connection: socket.socket) -> None:
    """Close what the peer of an accepted socket has sent along, before the kernel does: it lingers."""
    space = socket.CMSG_SPACE(PACKET_FDS_MAX * array.array("i").itemsize) + socket.CMSG_SPACE(12)
    try:
        connection.settimeout(0)
        # With its sender's credentials (12 bytes) on it, an empty packet differs from the end.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        connection.shutdown(socket.SHUT_RD)
        while True:
            _, ancillary, _, _ = connection.recvmsg(1, space)
            if not ancillary:
                return
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds = array.array("i")
                    fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                    for fd in fds:
                        _close(fd)
    except OSError as error:
        log.debug("ignoring: a connection is closed with packets in it: %s", error.strerror)
