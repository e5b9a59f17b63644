"""Signals as bytes on a descriptor that the loop polls.

One object per program; `close` puts the handlers back.
"""

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from types import FrameType
    from typing import Any
else:
    import _signal as signal  # `signal` makes four enumerations at import: 5 ms


def _ignore(_number: int, _frame: "FrameType | None") -> None:
    """The byte on the wakeup descriptor says everything."""


class SignalPipe:
    """What the user's shell ignores (nohup, background jobs) stays ignored."""

    __slots__ = ("_before", "_write_fd", "fd")

    def __init__(self, numbers: tuple[int, ...]) -> None:
        self.fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._before: dict[int, Any] = {}
        for number in numbers:
            before = signal.getsignal(number)
            if before != signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, _ignore)

    def read(self) -> bytes:
        try:
            return os.read(self.fd, 256)
        except BlockingIOError:
            return b""

    def stop_self(self) -> None:
        """As if SIGTSTP had not been caught. Returns when continued; at once in an orphaned group."""
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, _ignore)

    def close(self) -> None:
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)
        if before or self.fd >= 0:
            signal.set_wakeup_fd(-1)
        for fd in (self.fd, self._write_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self._write_fd = -1
