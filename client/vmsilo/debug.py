"""vm-start-debug: a VM with its console on the user's terminal.

Owns a pseudoterminal whose slave the VMM gets three times, and copies between its master and the user's
terminal. The VMM must not get the user's own terminal: what a guest's kernel prints is as hostile as
anything else of a guest.
"""

import fcntl
import os
import select
import struct
import termios
import time

from vmsilo.bus import START_WAIT, Bus, check_known, is_interactive
from vmsilo.errors import ClientError, UsageError, printable, write_stderr
from vmsilo.names import check_name
from vmsilo.options import parse_escapes, parse_options
from vmsilo.outputs import Output, OutputClosedError
from vmsilo.place import Place
from vmsilo.signals import SignalPipe
from vmsilo.termfilter import TerminalFilter
from vmsilo.terminal import RawTerminal, find_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:
    import _signal as signal

PROGRAM = "vm-start-debug"
LEAVE_KEY = b"\x1d"  # Ctrl-]
END_WAIT = 15  # seconds for vmsilod to give back what the VM held
ASK_AFTER = 1.0
ENDED = ("stopped", "failed", "broken")
READ_SIZE = 16384
PENDING_MAX = 256 * 1024
SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGCONT,
    signal.SIGWINCH,
)  # fmt: skip

USAGE = """\
Usage: vm-start-debug [--escapes colour|all] NAME
Starts the VM NAME with its console on this terminal. Ctrl-] ends the VM.

Exit status: 0 the VM ended, 1 it failed, 2 wrong command line.
"""


def main(argv: list[str], place: Place) -> int:
    options, rest = parse_options(argv, ("--help", "-h"), ("--escapes",))
    if "--help" in options or "-h" in options:
        os.write(1, USAGE.encode())
        return 0
    if len(rest) != 1:
        raise UsageError("no VM named" if not rest else "one VM at a time")
    name = check_name(rest[0])
    escapes = parse_escapes(options)
    bus = Bus(place, interactive=is_interactive())
    try:
        check_known(bus, name, place)
        bus.watch_states()
        console = Console(bus, name, escapes=escapes)
        try:
            unit = console.start()
            left = console.run()
        finally:
            console.close()
        if left:
            bus.call("Kill", "s", (name,), wait=START_WAIT)
            write_stderr(f"{PROGRAM}: VM '{name}' was ended\n")
            return 0
        return _say_end(name, unit, *console.await_end())
    finally:
        bus.close()


def _say_end(name: str, unit: str, state: str, reason: str) -> int:
    if state in ("failed", "broken"):
        raise ClientError(f"VM '{name}' failed: {reason or state}", f"journalctl -b -u {unit}")
    write_stderr(f"{PROGRAM}: VM '{name}' has ended ({reason or 'success'})\n")
    return 0


class Console:
    """The pseudoterminal and what is attached to it while the VM runs."""

    def __init__(self, bus: Bus, name: str, *, escapes: bool) -> None:
        self._bus = bus
        self._name = name
        self._master, self._slave = os.openpty()
        os.set_blocking(self._master, False)
        self._resize()
        self._stdin_open = True
        self._end: tuple[str, str] | None = None
        self._typed = b""
        self._signals = SignalPipe(SIGNALS)
        self._raw = RawTerminal(0) if os.isatty(0) else None
        filtered = os.isatty(1) and not escapes
        self._output = Output(1, TerminalFilter() if filtered else None)

    def start(self) -> str:
        """The unit that runs the VM."""
        fds = (self._slave, self._slave, self._slave)
        (unit,) = self._bus.call("StartDebug", "shhh", (self._name, *fds), wait=START_WAIT)
        slave, self._slave = self._slave, -1
        os.close(slave)
        if self._raw is not None:
            write_stderr(f"{PROGRAM}: console of '{self._name}', Ctrl-] ends the VM\n")
            self._raw.enter()
        return str(unit)

    def run(self) -> bool:
        """True if the user left, False if the VM ended."""
        ended = False
        while True:
            ready = self._wait(0 if ended else None)
            if self._master in ready and not self._copy_output():
                return self._finish()
            if self._output.fd in ready:
                self._output.flush()
            if 0 in ready and self._copy_input():
                return True
            if self._signals.fd in ready and self._serve_signals():
                return True
            if self._bus.fileno() in ready:
                ended = self._has_ended()
            if ended and self._master not in ready and not self._output.pending:
                return self._finish()

    def await_end(self) -> tuple[str, str]:
        """(state, reason) with which the VM ended: its console may be gone before vmsilod has said so."""
        deadline = time.monotonic() + END_WAIT
        poll = select.poll()
        poll.register(self._bus.fileno(), select.POLLIN)
        while not self._has_ended() and time.monotonic() < deadline:
            if not poll.poll(ASK_AFTER * 1000):
                # A vmsilod that was restarted meanwhile tells its changes only to those who have asked it.
                vm = self._bus.find_vm(self._name) or {"State": "stopped"}
                if vm.get("State") in ENDED:
                    return str(vm["State"]), printable(vm.get("LastResult") or "")
        return self._end or ("unknown", "vmsilod does not say how")

    def _has_ended(self) -> bool:
        for name, state, reason in self._bus.read_states():
            if self._end is None and name == self._name and state in ENDED:
                self._end = (state, printable(reason))
        return self._end is not None

    def close(self) -> None:
        if self._raw is not None:
            self._raw.leave()
        self._signals.close()
        self._output.close()
        for fd in (self._master, self._slave):
            if fd >= 0:
                os.close(fd)
        self._master = self._slave = -1

    def _finish(self) -> bool:
        try:
            self._output.finish()
        except OutputClosedError:
            return False
        return False

    def _wait(self, timeout: int | None) -> set[int]:
        poll = select.poll()
        poll.register(self._signals.fd, select.POLLIN)
        poll.register(self._bus.fileno(), select.POLLIN)
        if self._output.pending:
            poll.register(self._output.fd, select.POLLOUT)
        mask = select.POLLOUT if self._typed else 0
        if len(self._output.pending) < PENDING_MAX:
            mask |= select.POLLIN
        if mask:
            poll.register(self._master, mask)
        if self._stdin_open:
            poll.register(0, select.POLLIN)
        return {fd for fd, _events in poll.poll(timeout)}

    def _copy_output(self) -> bool:
        self._type(b"")
        try:
            data = os.read(self._master, READ_SIZE)
        except BlockingIOError:
            return True
        except OSError:  # EIO: no slave is open any more
            return False
        try:
            self._output.put(data)
        except OutputClosedError:
            return False
        return bool(data)

    def _copy_input(self) -> bool:
        """True if the user leaves."""
        try:
            data = os.read(0, READ_SIZE)
        except OSError:
            data = b""
        if not data:
            self._stdin_open = False
            return self._raw is not None
        if self._raw is not None and LEAVE_KEY in data:
            return True
        self._type(data)
        return False

    def _type(self, data: bytes) -> None:
        """Keys for a console that does not take them are kept up to READ_SIZE."""
        typed = (self._typed + data)[:READ_SIZE]
        self._typed = typed
        if typed:
            try:
                self._typed = typed[os.write(self._master, typed) :]
            except BlockingIOError:
                return
            except OSError:
                self._typed = b""

    def _serve_signals(self) -> bool:
        ends = False
        for number in self._signals.read():
            ends = self._signal(number) or ends
        return ends

    def _signal(self, number: int) -> bool:
        """True if it ends the session."""
        if number == signal.SIGTSTP:
            if self._raw is not None:
                self._raw.leave()
            self._signals.stop_self()
        if number in (signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH):
            if self._raw is not None and number != signal.SIGWINCH:
                self._raw.enter()
            self._resize()
            return False
        return True

    def _resize(self) -> None:
        size = find_size(1) or find_size(0)
        if size is not None:
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
