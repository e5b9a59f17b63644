"""The lines of one VM's console in the journal of the VM's unit: cleaned, at a bounded rate, never waiting.

A UnitLog belongs to one run of a Console, which feeds it and closes it. It owns the stream socket that
vmsilod passed: at its other side a process of the unit writes what it reads to the unit's journal. Where
there is none, lines go to consoled's own standard error with the VM's name.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time

from vmsilo_relay.journal import ERROR, INFO

from vmsilo_console.plaintext import RAW_MAX, clean_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsilo_relay.loop import Timer

    from vmsilo_console.context import Context

STDERR = 2
# What systemd writes over and over, in place, while a job takes long: nothing that a log needs every time.
ANIMATION = re.compile(rb"\[[ *]{6}\] ")


class UnitLog:
    """`stream` may be None; else it is this object's from now on."""

    def __init__(self, context: Context, name: str, stream: socket.socket | None) -> None:
        self._context = context
        self._name = name
        self._stream = stream
        self._line = b""  # begun, not ended, at most RAW_MAX bytes of it
        self._tail = b""  # of a line that the stream took a part of
        self._tokens = float(context.limits.log_burst)
        self._refilled = time.monotonic()
        self._next_animation = 0.0  # on the monotonic clock
        self._dropped = 0
        self._notice: Timer | None = None

    def feed(self, untrusted_data: bytes) -> None:
        self._refill()
        lines = untrusted_data.split(b"\n")
        if len(lines) > 1:
            self._put_line(self._line + lines[0])
            for line in lines[1:-1]:
                self._put_line(line)
            self._line = b""
        self._line = (self._line + lines[-1])[:RAW_MAX]

    def close(self) -> None:
        """The run has ended: what is left of a line, and of what was dropped, is said now."""
        self._put_line(self._line)
        self._line = b""
        if self._notice is not None:
            self._notice.cancel()
            self._notice = None
        if self._dropped:
            self._say_dropped()
        self.abandon()

    def abandon(self) -> None:
        """Close the stream; further lines have the fallback."""
        stream, self._stream = self._stream, None
        self._tail = b""
        if stream is not None:
            stream.close()  # no shutdown: a launcher that asked again has passed the same one again

    def _refill(self) -> None:
        now = time.monotonic()
        limits = self._context.limits
        earned = (now - self._refilled) * limits.log_rate
        self._tokens = min(float(limits.log_burst), self._tokens + earned)
        self._refilled = now

    def _put_line(self, untrusted_line: bytes) -> None:
        if untrusted_line in (b"", b"\r"):
            return
        if self._tokens < 1:
            self._drop()
            return
        self._tokens -= 1  # also where nothing is left to see: looking at it is what costs
        text = clean_line(untrusted_line)
        if ANIMATION.match(text):
            if self._refilled < self._next_animation:
                return
            self._next_animation = self._refilled + self._context.limits.animation_seconds
        if text and not self._write(b"<6>console: " + text + b"\n"):
            self._drop()

    def _drop(self) -> None:
        self._dropped += 1
        if self._notice is None:
            seconds = self._context.limits.notice_seconds
            self._notice = self._context.loop.after(seconds, self._say_dropped, self._fail)

    def _say_dropped(self) -> None:
        self._notice = None
        if self._write(b"<5>console: %d lines were dropped\n" % self._dropped):
            self._dropped = 0
        else:
            self._dropped -= 1
            self._drop()  # no room for this line either: again after a while

    def _write(self, line: bytes) -> bool:
        """False if the journal has no room for the line."""
        if self._stream is None:
            priority, _, text = line.partition(b">")
            return write_stderr(priority + b">" + self._name.encode() + b": " + text)
        try:
            if self._tail:
                # The stream's end is in the midst of a line: nothing may come before the rest of it.
                self._tail = self._tail[self._send(self._stream, self._tail) :]
            if self._tail:
                return False
            self._tail = line[self._send(self._stream, line) :]
        except BlockingIOError:
            return False
        except OSError as error:
            # Most often because the whole unit was killed, and the console's end is not seen yet.
            reason = f"the unit's log writer is gone, using our own: {error.strerror}"
            self._context.journal.log(INFO, self._name, reason)
            self.abandon()
            return self._write(line)
        return True

    @staticmethod
    def _send(stream: socket.socket, data: bytes) -> int:
        return stream.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _fail(self, error: Exception) -> None:
        self._context.journal.log(ERROR, self._name, f"logging the console failed: {error!r}")


def write_stderr(line: bytes) -> bool:
    """To the journal's stream without waiting; to a file or a terminal, when started by hand, plainly."""
    fd = os.dup(STDERR)
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        with os.fdopen(fd, "wb", buffering=0) as file, contextlib.suppress(OSError):
            file.write(line)
        return True
    with sock:
        try:
            return sock.send(line, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) == len(line)
        except OSError:
            return False  # full, or nobody is there
