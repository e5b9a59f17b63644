"""A running command's data: its standard input with the window, its outputs, its terminal.

Owned by the connection, which says when its own buffer is full.  Never starts, signals or awaits a process.
"""

import contextlib
import errno
import fcntl
import os
import struct
import termios
from collections.abc import Callable

from vmsilo_wire import HEADER_SIZE, STDERR, STDIN_WINDOW, STDOUT, ProtocolError

from vmsilo_agent.account import Account
from vmsilo_agent.child import Stdio
from vmsilo_agent.loop import READ, WRITE, Callback, Loop

_PIPE_SIZE = 1024 * 1024
# A frame that an empty socket buffer (208 KiB of a Unix socket, 256 KiB of vsock) takes whole is not copied.
_READ_SIZE = 128 * 1024
_ACK_STEP = (
    STDIN_WINDOW // 8
)  # acknowledge in steps, so that a byte-wise reader does not cause a frame per byte


Guard = Callable[[Callback], Callback]  # what the owner puts around the callbacks of its watches


class Streams:
    """The agent's ends.  `stdin` and `outputs` are descriptors that somebody has to close."""

    __slots__ = ("outputs", "pty", "stdin", "stdio")

    def __init__(self, stdio: Stdio, stdin: int | None, outputs: dict[int, int]) -> None:
        self.stdio = stdio
        self.stdin = stdin
        self.outputs = outputs  # descriptor -> STDOUT or STDERR
        self.pty = next(iter(outputs)) if stdio.pty else None

    def close_child_ends(self) -> None:
        for fd in set(self.stdio.fds):
            os.close(fd)
        self.stdio = Stdio((-1, -1, -1), pty=False)

    def close_own_ends(self) -> None:
        for fd in self.outputs:
            os.close(fd)
        if self.stdin is not None:
            os.close(self.stdin)
        self.outputs, self.stdin = {}, None


def open_pipes() -> Streams:
    fds: list[int] = []
    try:
        for _ in range(3):
            fds += os.pipe2(os.O_CLOEXEC)
    except OSError:
        for fd in fds:
            os.close(fd)
        raise
    for own in (fds[1], fds[2], fds[4]):
        os.set_blocking(own, False)  # per end of a pipe: the command's own ends stay blocking
        _enlarge(own)
    stdio = Stdio((fds[0], fds[3], fds[5]), pty=False)
    return Streams(stdio, fds[1], {fds[2]: STDOUT, fds[4]: STDERR})


def open_null() -> Streams:
    fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    return Streams(Stdio((fd, fd, fd), pty=False), None, {})


def open_terminal(rows: int, cols: int, account: Account) -> Streams:
    master, slave = os.openpty()  # both close-on-exec
    try:
        resize(master, rows, cols)
        if os.geteuid() == 0:
            os.fchown(slave, account.uid, -1)  # the command may open its terminal by name
        os.set_blocking(master, False)
        # The same description twice, because reading and writing are watched independently of each other.
        writer = fcntl.fcntl(master, fcntl.F_DUPFD_CLOEXEC, 3)
    except OSError:
        os.close(master)
        os.close(slave)
        raise
    return Streams(Stdio((slave, slave, slave), pty=True), writer, {master: STDOUT})


def resize(terminal: int, rows: int, cols: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))


def _enlarge(pipe: int) -> None:
    with contextlib.suppress(OSError):  # over the user's pipe quota: slower, not wrong
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)


class Input:
    """Bytes from the client on their way into the command; at most STDIN_WINDOW of them, by protocol."""

    def __init__(
        self, loop: Loop, fd: int | None, acknowledge: Callable[[int], None], guard: Guard, *, pty: bool
    ) -> None:
        self._loop = loop
        self._fd = fd
        self._acknowledge = acknowledge
        self._pty = pty
        self._buffer = bytearray()
        self._eof = False
        self._taken = 0  # not acknowledged yet
        self._blocked = False
        self._on_writable = guard(self._writable)

    def feed(self, data: bytes | memoryview) -> None:
        """ProtocolError where the client sent more than the window, or anything after the end.

        Keeps none of `data`, which may be a view.
        """
        if self._eof:
            raise ProtocolError("STDIN after its end")
        if len(self._buffer) + self._taken + len(data) > STDIN_WINDOW:
            raise ProtocolError("STDIN beyond the window")
        if not len(data):
            self._eof = True
            if self._pty and self._fd is not None:
                end = termios.tcgetattr(self._fd)[6][termios.VEOF]
                self._buffer += end
                self._taken -= len(end)  # the client did not send it, so it is not acknowledged
        if not self._buffer:  # the usual case: nothing is copied
            data = data[self._pour(data) :]
        self._buffer += data
        if not self._blocked:
            self._settle()

    def _pour(self, data: bytes | memoryview) -> int:
        """How much the command took of it."""
        poured = 0
        while poured < len(data) and self._fd is not None:
            try:
                poured += os.write(self._fd, data[poured:])
            except BlockingIOError:
                break
            except OSError:  # EPIPE, or EIO of a terminal that nobody has open
                self.close()
        self._taken += poured
        return poured

    def _settle(self) -> None:
        """After writing: watch, acknowledge or close, as what is left asks for."""
        if self._fd is None:
            self._taken += len(self._buffer)
            self._buffer.clear()
        was_blocked, self._blocked = self._blocked, bool(self._buffer)
        if self._fd is not None and self._blocked != was_blocked:
            self._loop.watch(self._fd, WRITE if self._blocked else 0, self._on_writable)
        if self._taken >= _ACK_STEP:
            self._acknowledge(self._taken)
            self._taken = 0
        if self._eof and not self._blocked and not self._pty:
            self.close()

    def acknowledge_rest(self) -> None:
        """Where no more is under way, less than a step is worth a frame."""
        if self._taken > 0 and not self._buffer:
            self._acknowledge(self._taken)
            self._taken = 0

    def _writable(self, _mask: int) -> None:
        with memoryview(self._buffer) as view:
            poured = self._pour(view)
        del self._buffer[:poured]
        self._settle()
        self.acknowledge_rest()

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            self._loop.forget(fd)
            os.close(fd)


class Output:
    """Frames out of pipes or a terminal.

    One read per wake-up and descriptor, so that no command starves another.  The payload is read behind the
    place of its header in one shared buffer: it is copied by the kernel only, unless the socket is full.
    """

    buffer = bytearray(HEADER_SIZE + _READ_SIZE)
    _room = memoryview(buffer)[HEADER_SIZE:]

    def __init__(
        self, loop: Loop, fds: dict[int, int], send: Callable[[int, int], None], guard: Guard
    ) -> None:
        """`send(type, length)` takes `length` bytes of payload out of `buffer`; 0: one output ended."""
        self._loop = loop
        self._fds = fds
        self._send = send
        self._readers: dict[int, Callable[[int], None]] = {}
        self._paused = False
        self.active = False  # data came since somebody last cleared this
        for fd in fds:
            self._readers[fd] = guard(self._reader(fd))
            loop.watch(fd, READ, self._readers[fd])

    @property
    def ended(self) -> bool:
        return not self._fds

    @property
    def paused(self) -> bool:
        return self._paused

    def pause(self) -> None:
        if not self._paused:
            self._paused = True
            for fd in self._fds:
                self._loop.forget(fd)  # a mask of 0 would still report hang-ups

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            for fd in self._fds:
                self._loop.watch(fd, READ, self._readers[fd])

    def close(self) -> None:
        for fd in list(self._fds):
            self._drop(fd)

    def _reader(self, fd: int) -> Callable[[int], None]:
        def ready(_mask: int) -> None:
            try:
                count = os.readv(fd, [self._room])
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno != errno.EIO:  # what a terminal says when its last user is gone
                    raise
                count = 0
            kind = self._fds[fd]
            if count == 0:
                self._drop(fd)
            self.active = True
            self._send(kind, count)

        return ready

    def _drop(self, fd: int) -> None:
        self._loop.forget(fd)
        del self._fds[fd]
        os.close(fd)
