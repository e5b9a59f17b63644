"""One connection to a guest, mostly to its agent, from the first connect until the first frames are written.

Owned by whoever wants the connection (a command client or a control request), who cancels it when the want
ends. Works for kernel and for hybrid vsock. Never blocks and never reads a byte that the agent sent: in
hybrid mode exactly the device's answer line is taken.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from vmsilo_wire import AGENT_PORT

from vmsilo_relay.journal import ERROR
from vmsilo_relay.loop import READ, WRITE
from vmsilo_relay.record import HybridChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmsilo_relay.context import Context
    from vmsilo_relay.loop import Timer
    from vmsilo_relay.record import Channel

STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
ANSWER_MAX = 32  # "OK 4294967295\n" fits twice
RETRY_FIRST, RETRY_MAX = 0.02, 0.25  # seconds
# What passes while an agent restarts, a backlog is full or a device is not yet listening.
PASSING = frozenset(
    {
        errno.EAGAIN,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EPIPE,
        errno.ETIMEDOUT,
        errno.ENOENT,
        errno.ENOTCONN,
    }
)
CONNECTING, GREETING, ANSWER, FRAMES = range(4)


class Unusable(Exception):
    """The channel is not what vmsilod said it is; trying again won't help."""


class Passing(Exception):
    """The other side is not there just now."""


class Dial:
    """Calls `done(socket, "")` with a blocking connected socket, or `done(None, reason)`, exactly once."""

    def __init__(
        self,
        context: Context,
        channel: Channel,
        frames: bytes,
        done: Callable[[socket.socket | None, str], None],
        *,
        port: int = AGENT_PORT,
    ) -> None:
        self._port = port
        self._context = context
        self._channel = channel
        self._frames = frames
        self._done: Callable[[socket.socket | None, str], None] | None = done
        self._sock: socket.socket | None = None
        self._phase = CONNECTING
        self._out = memoryview(b"")
        self._answer = b""
        self._retry = RETRY_FIRST
        self._seconds = context.limits.dial_seconds
        self._reason = "no answer"
        self._timer: Timer | None = None
        self._deadline: Timer | None = None

    def start(self, seconds: float | None = None) -> None:
        """`seconds` for all attempts together; by default those of the limits."""
        if seconds is not None:
            self._seconds = seconds
        self._deadline = self._context.loop.after(self._seconds, self._expire, self._fail)
        self._attempt()

    def cancel(self) -> None:
        """Give up without calling `done`; may be called at any time."""
        self._done = None
        self._drop()
        if self._deadline is not None:
            self._deadline.cancel()

    def _attempt(self) -> None:
        self._timer = None
        try:
            self._open()
        except (Passing, OSError) as exc:
            self._try_later(exc)
        except Unusable as exc:
            self._finish(None, str(exc))

    def _open(self) -> None:
        if isinstance(self._channel, HybridChannel):
            self._sock = open_hybrid(self._channel)
            self._phase, self._out = GREETING, memoryview(b"CONNECT %d\n" % self._port)
            self._answer = b""
            self._send()
            return
        sock = socket.socket(socket.AF_VSOCK, STREAM)
        self._sock, self._phase = sock, CONNECTING
        error = sock.connect_ex((self._channel.cid, self._port))
        if error == errno.EINPROGRESS:
            self._watch(WRITE)
        elif error:
            raise OSError(error, os.strerror(error))
        else:
            self._send_frames()

    def _watch(self, events: int) -> None:
        assert self._sock is not None
        self._context.loop.watch(self._sock.fileno(), events, self._on_event, self._fail)

    def _on_event(self, _events: int) -> None:
        assert self._sock is not None
        try:
            if self._phase == CONNECTING:
                error = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise OSError(error, os.strerror(error))
                self._send_frames()
            elif self._phase == ANSWER:
                self._read_answer()
            else:
                self._send()
        except (Passing, OSError) as exc:
            self._try_later(exc)
        except Unusable as exc:
            self._finish(None, str(exc))

    def _send_frames(self) -> None:
        self._phase, self._out = FRAMES, memoryview(self._frames)
        self._send()

    def _send(self) -> None:
        assert self._sock is not None
        while self._out:
            try:
                sent = self._sock.send(self._out, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._watch(WRITE)
                return
            self._out = self._out[sent:]
        if self._phase == GREETING:
            self._phase = ANSWER
            self._watch(READ)
        else:
            self._finish(self._sock, "")

    def _read_answer(self) -> None:
        """Take the device's line and nothing behind it, whose bytes belong to the agent."""
        assert self._sock is not None
        try:
            untrusted_seen = self._sock.recv(ANSWER_MAX - len(self._answer), socket.MSG_PEEK)
        except BlockingIOError:
            return
        if not untrusted_seen:
            raise Passing("the device closed the connection")
        line, newline, _rest = untrusted_seen.partition(b"\n")
        self._answer += self._sock.recv(len(line) + len(newline))
        if newline:
            if not self._answer.startswith(b"OK ") or not self._answer[3:-1].isdigit():
                raise Unusable("the device gave no OK")
            self._send_frames()
        elif len(self._answer) >= ANSWER_MAX:
            raise Unusable("the device's answer is too long")

    def _try_later(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno not in PASSING:
            self._finish(None, error.strerror or repr(error))
            return
        self._reason = str(error)
        self._drop()
        # Spread out: hundreds that met a full backlog together must not meet it together again.
        delay = self._retry * (0.5 + os.urandom(1)[0] / 255)
        self._timer = self._context.loop.after(delay, self._attempt, self._fail)
        self._retry = min(self._retry * 2, RETRY_MAX)

    def _expire(self) -> None:
        self._finish(None, f"no connection within {self._seconds:g} s ({self._reason})")

    def _fail(self, error: Exception) -> None:
        self._context.journal.log(ERROR, "relayd", f"connecting to an agent failed: {error!r}")
        self._finish(None, "internal error")

    def _finish(self, sock: socket.socket | None, reason: str) -> None:
        done, self._done = self._done, None
        if sock is not None:
            self._context.loop.forget(sock.fileno())
            self._sock = None
            sock.settimeout(None)
        self._drop()
        if self._deadline is not None:
            self._deadline.cancel()
        if done is not None:
            done(sock, reason)
        elif sock is not None:
            sock.close()

    def _drop(self) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            self._context.loop.forget(sock.fileno())
            sock.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def open_hybrid(channel: HybridChannel) -> socket.socket:
    """Connect to a hybrid device's socket, which lies in a directory that the VM's own uid may write.

    So the object is opened first, checked, and then connected to by descriptor: no link is followed and no
    other socket put in its place. Raises Unusable, or OSError.
    """
    fd = os.open(channel.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISSOCK(found.st_mode):
            raise Unusable("the vsock path is not a socket")
        if found.st_uid != channel.uid:
            raise Unusable(f"the vsock socket belongs to uid {found.st_uid}, not to the VM's {channel.uid}")
        with contextlib.ExitStack() as stack:
            sock = socket.socket(socket.AF_UNIX, STREAM)
            stack.callback(sock.close)
            sock.connect(f"/proc/self/fd/{fd}")
            stack.pop_all()
            return sock
    finally:
        os.close(fd)
