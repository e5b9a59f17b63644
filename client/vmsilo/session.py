"""One command in a guest, from the connected descriptor to its exit status: bytes, window size, signals.

Owns the connection, the signal handlers and the terminal's mode while it runs; `run_session` gives all of
them back on every way out. The guest is hostile: it may send anything, nothing, or never stop, and the
user can leave all the same.
"""

import os
import select
import time

import vmsilo_wire as wire
from vmsilo_wire import payload as wire_payload

from vmsilo.errors import ClientError, LostError, printable
from vmsilo.frames import FrameReader, FrameWriter
from vmsilo.outputs import Output, OutputClosedError
from vmsilo.signals import SignalPipe
from vmsilo.termfilter import TerminalFilter

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal

    from vmsilo.terminal import LeaveEscape, RawTerminal
else:
    import _signal as signal

READ_SIZE = 512 * 1024
PENDING_MAX = 512 * 1024  # bytes not yet written to the user's outputs; then the guest waits
TYPED_MAX = 64 * 1024  # keys that the guest does not take; the rest is dropped, so `~.` is always seen
ANSWER_WAIT = 60.0  # seconds until the guest has to say STARTED or ERROR
IMPATIENT = (3, 2.0)  # this many of one signal within so many seconds leave a command that does not answer
ERROR_STATUS = {"not-found": 127, "not-executable": 126}

PIPE_MODE = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
    signal.SIGTSTP, signal.SIGCONT,
)  # fmt: skip
PTY_MODE = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGCONT,
    signal.SIGWINCH,
)  # fmt: skip
INSISTENT = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
ENDING = (*INSISTENT, signal.SIGHUP)


class Wish:
    """What the user asked of the session."""

    __slots__ = ("detach", "escapes", "pty")

    def __init__(self, *, pty: bool, detach: bool, escapes: bool) -> None:
        self.pty = pty
        self.detach = detach
        self.escapes = escapes


class Left(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def run_session(fd: int, first: bytes, wish: Wish) -> int:
    """The command's exit status. `first` is the SPAWN frame, empty if it was sent already. Closes `fd`."""
    session = Session(fd, wish)
    try:
        session.open()
        return session.run(first)
    except Left as left:
        return left.status
    except OutputClosedError:
        return 128 + signal.SIGPIPE
    except wire.ProtocolError as exc:
        raise ClientError(f"the guest broke the protocol: {printable(exc)}") from exc
    finally:
        session.close()


class Session:
    __slots__ = (
        "_buffer", "_deadline", "_escape", "_fd", "_insisted", "_outputs", "_poll", "_polled", "_raw",
        "_reader", "_signals", "_started", "_status", "_stdin_open", "_unacknowledged", "_wish", "_writer",
    )  # fmt: skip

    def __init__(self, fd: int, wish: Wish) -> None:
        self._fd = fd
        self._wish = wish
        self._reader = FrameReader()
        self._writer = FrameWriter(fd)
        self._outputs: dict[int, Output] = {}
        self._signals: SignalPipe | None = None
        self._raw: RawTerminal | None = None
        self._escape: LeaveEscape | None = None
        self._buffer = memoryview(bytearray(READ_SIZE))
        self._poll = select.poll()
        self._polled: dict[int, int] = {}
        self._stdin_open = not wish.detach
        self._unacknowledged = 0
        self._started = False
        self._status: int | None = None
        self._deadline = time.monotonic() + ANSWER_WAIT
        self._insisted: list[tuple[float, int]] = []

    def open(self) -> None:
        self._signals = SignalPipe(PTY_MODE if self._wish.pty else PIPE_MODE)
        for kind, fd in ((wire.STDOUT, 1), (wire.STDERR, 2)):
            filtered = not self._wish.escapes and os.isatty(fd)
            self._outputs[kind] = Output(fd, TerminalFilter() if filtered else None)
        if self._wish.pty:
            from vmsilo.terminal import LeaveEscape, RawTerminal

            self._escape = LeaveEscape()
            self._raw = RawTerminal(0)
            self._raw.enter()

    def close(self) -> None:
        if self._raw is not None:
            self._raw.leave()
        if self._signals is not None:
            self._signals.close()
        for output in self._outputs.values():
            output.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def run(self, first: bytes) -> int:
        if first:
            self._writer.send_encoded(first)
        while True:
            if self._status is not None and not self._pending():
                return self._finish(self._status)
            timeout = None
            if not self._started and self._status is None:
                timeout = max(self._deadline - time.monotonic(), 0) * 1000
            ready = self._wait(timeout)
            if timeout is not None and not ready and time.monotonic() >= self._deadline:
                raise ClientError(f"the guest did not start the command within {int(ANSWER_WAIT)} s")
            self._serve(ready)

    def _finish(self, status: int) -> int:
        for output in self._outputs.values():
            output.finish()
        return status

    def _pending(self) -> int:
        return sum(len(o.pending) for o in self._outputs.values())

    def _serve(self, ready: "list[tuple[int, int]]") -> None:
        for fd, events in ready:
            if fd == self._fd:
                if events & ~select.POLLOUT and self._status is None:
                    self._read_guest()
                if events & select.POLLOUT:
                    self._writer.flush()
            elif self._signals is not None and fd == self._signals.fd:
                for number in self._signals.read():
                    self._signal(number)
            elif fd == 0:
                self._read_stdin()
            else:
                for output in self._outputs.values():
                    if output.fd == fd:
                        output.flush()

    def _wait(self, timeout: float | None) -> "list[tuple[int, int]]":
        """Polls only what can make progress: poll reports a hangup of any descriptor it is given."""
        wanted: dict[int, int] = {}
        if self._signals is not None:
            wanted[self._signals.fd] = select.POLLIN
        pending = 0
        for output in self._outputs.values():
            if output.pending:
                wanted[output.fd] = select.POLLOUT
                pending += len(output.pending)
        if self._status is None and pending < PENDING_MAX:
            wanted[self._fd] = select.POLLIN
        if self._writer.pending:
            wanted[self._fd] = wanted.get(self._fd, 0) | select.POLLOUT
        if self._stdin_open and self._wants_stdin():
            wanted[0] = select.POLLIN
        if wanted != self._polled:
            for fd in self._polled.keys() - wanted.keys():
                self._poll.unregister(fd)
            for fd, mask in wanted.items():
                self._poll.register(fd, mask)
            self._polled = wanted
        return self._poll.poll(timeout)

    # From the guest

    def _read_guest(self) -> None:
        try:
            count = os.readv(self._fd, [self._buffer])
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            if self._started:
                raise LostError("the connection to the guest was lost")
            raise ClientError("the guest closed the connection before it started the command")
        for kind, payload in self._reader.feed(self._buffer[:count]):
            if kind in (wire.STDOUT, wire.STDERR):
                if not self._wish.detach:
                    self._outputs[kind].put(payload)
            elif self._status is None:
                self._control(kind, bytes(payload))

    def _control(self, kind: int, untrusted_payload: bytes) -> None:
        if kind == wire.CONSUMED:
            count = wire.parse_consumed(untrusted_payload)
            if count > self._unacknowledged:
                raise wire.ProtocolError("more input consumed than was sent")
            self._unacknowledged -= count
        elif kind == wire.STARTED:
            wire_payload.parse_started(untrusted_payload)
            self._started = True
            if self._wish.detach:
                self._status = 0
        elif kind == wire.EXIT:
            status = wire_payload.parse_exit(untrusted_payload)
            self._status = status if status >= 0 else 128 - status
        elif kind == wire.ERROR:
            code, untrusted_text = wire_payload.parse_error(untrusted_payload)
            raise ClientError(printable(untrusted_text) or code, status=ERROR_STATUS.get(code, 125))

    # From the user

    def _wants_stdin(self) -> bool:
        if self._wish.pty:
            return True
        if not self._started or self._status is not None:
            return False
        return not self._writer.pending and self._unacknowledged < wire.STDIN_WINDOW

    def _read_stdin(self) -> None:
        room = wire.STDIN_WINDOW - self._unacknowledged
        size = TYPED_MAX if self._wish.pty else min(wire.DATA_MAX, room)
        piece: bytes | memoryview
        try:
            piece = self._buffer[: os.readv(0, [self._buffer[:size]])]
        except BlockingIOError:
            return
        except OSError:
            piece = b""  # not open, or its terminal is gone
        if not len(piece):
            self._stdin_open = False
            if self._wish.pty:
                raise Left(128 + signal.SIGHUP)
            self._writer.send(wire.STDIN, b"")
            return
        if self._escape is not None:
            piece, leaves = self._escape.feed(bytes(piece))
            if leaves:
                raise Left(128 + signal.SIGHUP)
            if len(self._writer.pending) + len(piece) > TYPED_MAX or len(piece) > room:
                return
        if len(piece):
            self._unacknowledged += len(piece)
            self._writer.send(wire.STDIN, piece)

    def _signal(self, number: int) -> None:
        if number in INSISTENT:
            self._insist(number)
        if self._raw is None:
            self._forward(number)
        elif number == signal.SIGWINCH:
            self._resize()
        elif number == signal.SIGTSTP:
            self._raw.leave()
            self._stop()
        elif number == signal.SIGCONT:
            self._raw.enter()
            self._resize()
        else:
            raise Left(128 + number)

    def _forward(self, number: int) -> None:
        if self._status is not None and number in ENDING:
            raise Left(128 + number)
        self._writer.send(wire.SIGNAL, bytes([number]))
        if number == signal.SIGTSTP:
            self._stop()
            self._writer.send(wire.SIGNAL, bytes([signal.SIGCONT]))

    def _stop(self) -> None:
        if self._signals is not None:
            self._signals.stop_self()
        if self._raw is not None:
            self._raw.enter()
            self._resize()

    def _insist(self, number: int) -> None:
        times, span = IMPATIENT
        now = time.monotonic()
        self._insisted = [(t, n) for t, n in self._insisted if n == number and now - t <= span]
        self._insisted.append((now, number))
        if len(self._insisted) >= times:
            raise Left(128 + number)

    def _resize(self) -> None:
        from vmsilo.terminal import find_size

        size = find_size(1) or find_size(0)
        if size is not None:
            self._writer.send_encoded(wire.encode_resize(*size))
