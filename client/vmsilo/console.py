"""A VM's console on the user's terminal, until the user leaves or the VM ends.

Owns the connection to consoled, the signal handlers and the terminal's mode while it runs; `run_console`
gives all of them back on every way out. The guest is hostile: its output passes a filter on its way to a
terminal, and the leave key acts whatever the guest does.
"""

import os
import select
import time

from vmsilo.console_size import ConsoleSize
from vmsilo.console_socket import (
    END,
    HISTORY_END,
    LOST,
    OUTPUT,
    REFUSED,
    SERVICE_HINT,
    STATE,
    WRITER,
    ConsoleAbsentError,
    ConsoleSocket,
    explain_absence,
    parse,
    refusal,
)
from vmsilo.errors import ClientError, write_stderr
from vmsilo.outputs import Output, OutputClosedError
from vmsilo.place import Place
from vmsilo.signals import SignalPipe
from vmsilo.termfilter import TerminalFilter
from vmsilo.terminal import RawTerminal, find_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from typing import Any
else:
    import _signal as signal

PROGRAM = "vm-shell"
LEAVE_KEY = b"\x1d"  # Ctrl-]
READ_SIZE = 16384
PENDING_MAX = 256 * 1024  # bytes not yet written to the user's output; then consoled waits, and counts
TYPED_MAX = 64 * 1024  # keys that consoled does not take; the rest is dropped, so the leave key is seen
ANSWER_WAIT = 15.0  # seconds; a consoled that was killed answers when it is back
RECONNECTS = 20
RECONNECT_PAUSE = 0.25
PACKETS_AT_ONCE = 16
SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGCONT,
    signal.SIGWINCH,
)  # fmt: skip


class Wish:
    """What the user asked of the console. `write`: ask, take or no."""

    __slots__ = ("escapes", "history", "log", "write")

    def __init__(self, *, history: bool, write: str, escapes: bool, log: bool = False) -> None:
        self.history = history
        self.write = write
        self.escapes = escapes
        self.log = log  # print the history and end


class Left(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def run_console(name: str, place: Place, wish: Wish) -> int:
    """The exit status."""
    try:
        attachment = Attachment(name, place, wish)
    except ConsoleAbsentError as absent:
        raise explain_absence(name, place, absent) from absent
    try:
        attachment.run()
    except Left as left:
        return left.status
    except OutputClosedError:
        return 128 + signal.SIGPIPE
    finally:
        attachment.close()
    return 0


def print_log(name: str, place: Place, *, escapes: bool) -> int:
    return run_console(name, place, Wish(history=True, write="no", escapes=escapes, log=True))


class Attachment:
    def __init__(self, name: str, place: Place, wish: Wish) -> None:
        self._name = name
        self._place = place
        self._wish = wish
        self._typed = b""
        self._stdin_open = not wish.log
        self._writes = False
        self._reason = ""  # of the end, from consoled; shown when all output is
        self._raw: RawTerminal | None = None
        self._size: ConsoleSize | None = None
        self._attached = False
        self._again = False
        self._deadline = time.monotonic() + ANSWER_WAIT
        self._socket = ConsoleSocket(name, place, history=wish.history, write=wish.write)
        self._signals = SignalPipe(SIGNALS)
        filtered = os.isatty(1) and not wish.escapes
        self._output = Output(1, TerminalFilter() if filtered else None)

    def run(self) -> None:
        while not (self._reason and not self._output.pending):
            ready = self._wait()
            if self._signals.fd in ready:
                for number in self._signals.read():
                    self._signal(number)
            if 0 in ready:
                self._read_stdin()
            if self._output.fd in ready:
                self._output.flush()
            if self._socket.fileno() in ready:
                self._send_typed(b"")
                self._receive()
            if self._size is not None:
                self._serve_size(self._size, ready)
            if not self._attached and time.monotonic() >= self._deadline:
                raise ClientError(f"no answer about the console of VM '{self._name}'", SERVICE_HINT)
        self._output.finish()
        if not self._wish.log:
            self._leave_terminal()
            what = "was removed" if self._reason == "removed" else "has ended"
            write_stderr(f"{PROGRAM}: VM '{self._name}' {what}\n")

    def close(self) -> None:
        self._leave_terminal()
        self._signals.close()
        self._output.close()
        self._socket.close()
        if self._size is not None:
            self._size.close()

    def _wait(self) -> set[int]:
        poll = select.poll()
        poll.register(self._signals.fd, select.POLLIN)
        if self._output.pending:
            poll.register(self._output.fd, select.POLLOUT)
        mask = select.POLLOUT if self._typed and self._attached else 0
        if len(self._output.pending) < PENDING_MAX and not self._reason:
            mask |= select.POLLIN
        if mask:
            poll.register(self._socket.fileno(), mask)
        # Keys are always read, for the leave key; what a pipe has waits until consoled takes it.
        if self._stdin_open and (self._raw is not None or (self._writes and not self._typed)):
            poll.register(0, select.POLLIN)
        deadlines = [] if self._attached else [self._deadline]
        if self._size is not None:
            if self._size.fd >= 0:
                poll.register(self._size.fd, select.POLLIN)
            if self._size.deadline is not None and not self._output.pending:
                deadlines.append(self._size.deadline)
        timeout = max(min(deadlines) - time.monotonic(), 0) * 1000 + 1 if deadlines else None
        return {fd for fd, _events in poll.poll(timeout)}

    # From consoled

    def _receive(self) -> None:
        for _ in range(PACKETS_AT_ONCE):
            if self._reason or len(self._output.pending) >= PENDING_MAX:
                return
            packet = self._socket.receive()
            if packet is None:
                return
            kind, payload = packet
            if kind == OUTPUT:
                self._output.put(payload)
            elif kind == b"":
                self._lost_connection()
                return
            else:
                self._control(kind, payload)

    def _control(self, kind: bytes, payload: bytes) -> None:
        if kind == REFUSED:
            raise refusal(self._name, payload)
        if kind == HISTORY_END:
            if self._wish.log:
                self._reason = "log"
        elif kind == STATE:
            self._attach(parse(payload))
        elif kind == END:
            self._reason = str(parse(payload).get("reason", "ended"))
        elif kind == WRITER:
            self._change_writer(parse(payload))
        elif kind == LOST:
            self._mark(f"{parse(payload).get('lost', 'some')} bytes of the console were lost here")

    def _attach(self, state: "dict[str, Any]") -> None:
        self._attached = True
        self._writes = state.get("writer") is True
        if self._wish.log:
            return
        if state.get("running") is not True:
            raise ClientError(
                f"VM '{self._name}' is not running",
                f"vm-shell --start {self._name}; vm-shell --log {self._name} shows its last console",
            )
        if self._again:
            self._say("the console service was restarted; output from before may be missing")
        else:
            self._say(f"console of {self._name} (Ctrl-] leaves)")
            if os.isatty(0):
                self._raw = RawTerminal(0)
                self._raw.enter()
        if not self._writes:
            self._say(f"read-only: {_who_writes(state)}")
            if self._wish.write != "no":
                self._say(f"to write here: {PROGRAM} --take {self._name}")
        if self._size is None:
            self._size = ConsoleSize(self._name, self._place)
        self._resize()

    def _change_writer(self, change: "dict[str, Any]") -> None:
        writes = change.get("writer") is True
        if writes != self._writes:
            self._say("you write now" if writes else f"read-only from here: {_who_writes(change)}")
        self._writes = writes
        if writes:
            self._resize()
        else:
            self._typed = b""

    def _lost_connection(self) -> None:
        """consoled was killed or restarted: the socket that it listens at outlives it, so it comes back."""
        if self._wish.log or not self._attached:
            raise ClientError(f"the connection to the console of VM '{self._name}' was lost", SERVICE_HINT)
        self._socket.close()
        self._attached, self._again = False, True
        self._deadline = time.monotonic() + ANSWER_WAIT
        # Another one may have taken the console since this one did.
        write = "ask" if self._wish.write == "take" and not self._writes else self._wish.write
        for _ in range(RECONNECTS):
            try:
                self._socket = ConsoleSocket(self._name, self._place, history=False, write=write)
            except ConsoleAbsentError:
                time.sleep(
                    RECONNECT_PAUSE
                )  # vmsilod gives a new consoled the sockets that systemd did not keep
            else:
                return
        self._socket = ConsoleSocket(self._name, self._place, history=False, write=write)

    # From the user

    def _read_stdin(self) -> None:
        try:
            data = os.read(0, READ_SIZE)
        except OSError:
            data = b""
        if not data:
            self._stdin_open = False
            if self._raw is not None:
                raise Left(128 + signal.SIGHUP)
            return
        leaves = self._raw is not None and LEAVE_KEY in data
        if self._writes:
            self._send_typed(data.partition(LEAVE_KEY)[0] if leaves else data)
        if leaves:
            self._output.finish()
            self._leave_terminal()
            write_stderr(f"\n{PROGRAM}: left the console of {self._name}\n")
            raise Left(0)

    def _send_typed(self, data: bytes) -> None:
        typed = (self._typed + data)[:TYPED_MAX]
        self._typed = typed[self._socket.send_input(typed) :] if typed and self._attached else typed

    def _signal(self, number: int) -> None:
        if number == signal.SIGTSTP:
            if self._raw is not None:
                self._raw.leave()
            self._signals.stop_self()
        if number in (signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH):
            if self._raw is not None and number != signal.SIGWINCH:
                self._raw.enter()
            self._resize()
            return
        raise Left(128 + number)

    def _resize(self) -> None:
        """The console has the size of its writer's terminal."""
        size = (find_size(1) or find_size(0)) if self._writes else None
        if size is not None and self._size is not None:
            self._size.tell(*size)

    def _serve_size(self, size: ConsoleSize, ready: set[int]) -> None:
        if size.fd in ready:
            size.on_input()
        # Not while what consoled says may wait unread: the VM may have stopped, and asking would start it.
        held = self._reason or self._output.pending or self._socket.fileno() in ready
        if size.deadline is not None and not held and time.monotonic() >= size.deadline:
            size.on_time()

    def _say(self, text: str) -> None:
        end = "\n" if self._raw is None else "\r\n"
        write_stderr(f"{PROGRAM}: {text}{end}")

    def _mark(self, text: str) -> None:
        """At its place in the output, and without waiting for a terminal that nobody reads."""
        if self._raw is None:
            self._say(text)
        else:
            self._output.put(f"\r\n{PROGRAM}: {text}\r\n".encode())

    def _leave_terminal(self) -> None:
        raw, self._raw = self._raw, None
        if raw is not None:
            raw.leave()


def _who_writes(state: "dict[str, Any]") -> str:
    pid = state.get("writer_pid")
    return f"process {pid} writes" if isinstance(pid, int) else "nobody writes"
