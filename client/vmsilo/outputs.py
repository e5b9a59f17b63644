"""One output descriptor of the user's, written without ever blocking the loop.

The descriptor is shared with the user's shell, so O_NONBLOCK is never set on it: that would change every
other program that has it. A pipe or a terminal is opened a second time through /proc, which gives a
description of our own; a socket takes MSG_DONTWAIT; files are always ready. Where none of this works the
descriptor is polled and given no more than it takes at once. Made by `session`, closed by it.
"""

import os
import select
import stat

from vmsilo.errors import ClientError
from vmsilo.termfilter import TerminalFilter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Data = bytes | memoryview

TERMINAL_CHUNK = 256  # n_tty reports POLLOUT while fewer than WAKEUP_CHARS (256) are queued
TTY_AUXILIARY_MAJOR = 5  # /dev/tty, /dev/console, /dev/ptmx: opening these again gives another device


class OutputClosedError(Exception):
    """Whoever read this output is gone: EPIPE."""


class Output:
    __slots__ = ("_filter", "_own", "_write", "fd", "pending")

    def __init__(self, fd: int, terminal_filter: TerminalFilter | None) -> None:
        self.fd = fd
        self.pending = b""
        self._filter = terminal_filter
        self._own = -1
        self._write: Callable[[Data], int] = self._choose()

    def put(self, data: "Data") -> None:
        """Raises OutputClosedError; what can't be written now stays in `pending`."""
        if self._filter is not None:
            data = self._filter.feed(data)
        self._put(data)

    def flush(self) -> None:
        data, self.pending = self.pending, b""
        self._put(data)

    def finish(self) -> None:
        """The last bytes: half a character that never became whole, and the end of colours."""
        if self._filter is not None:
            self._put(self._filter.feed(b"", final=True) + self._filter.reset())
            self._filter = None

    def close(self) -> None:
        own, self._own = self._own, -1
        if own >= 0:
            os.close(own)

    def _put(self, data: "Data") -> None:
        if self.pending:
            self.pending += bytes(data)
            return
        left = memoryview(data)
        while len(left):
            try:
                count = self._write(left)
            except BlockingIOError:
                count = 0
            except BrokenPipeError as exc:
                raise OutputClosedError from exc
            except OSError as exc:
                which = "standard error" if self.fd == 2 else "standard output"
                raise ClientError(f"cannot write to {which}: {exc.strerror}") from exc
            if not count:
                self.pending = bytes(left)
                return
            left = left[count:]

    def _choose(self) -> "Callable[[Data], int]":
        try:
            status = os.fstat(self.fd)
        except OSError:
            return self._write_plain  # closed: the first write says so
        if stat.S_ISSOCK(status.st_mode):
            return self._socket_writer()
        terminal = stat.S_ISCHR(status.st_mode) and os.isatty(self.fd)
        if not terminal and not stat.S_ISFIFO(status.st_mode):
            return self._write_plain
        if os.major(status.st_rdev) != TTY_AUXILIARY_MAJOR:
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            try:
                self._own = os.open(f"/proc/self/fd/{self.fd}", flags)
            except OSError:
                self._own = -1  # another user's terminal, no reader, no /proc: poll instead
            else:
                self.fd = self._own
                return self._write_plain
        return self._write_terminal if terminal else self._write_pipe

    def _write_plain(self, data: "Data") -> int:
        return os.write(self.fd, data)

    def _socket_writer(self) -> "Callable[[Data], int]":
        import _socket

        own = _socket.socket(fileno=os.dup(self.fd))

        def write(data: "Data") -> int:
            return own.send(data, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)

        return write

    def _write_terminal(self, data: "Data") -> int:
        return os.write(self.fd, data[:TERMINAL_CHUNK]) if self._ready() else 0

    def _write_pipe(self, data: "Data") -> int:
        return os.write(self.fd, data[: select.PIPE_BUF]) if self._ready() else 0

    def _ready(self) -> bool:
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        return bool(poll.poll(0))
