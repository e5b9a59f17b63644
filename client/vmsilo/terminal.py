"""The user's terminal: its size, raw mode and the way back, and the escape that leaves a VM's command.

Whoever makes a RawTerminal calls `leave` on every way out.
"""

import os
import termios

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def find_size(fd: int) -> tuple[int, int] | None:
    """Rows and columns; None where there is no terminal or it does not know."""
    try:
        size = os.get_terminal_size(fd)
    except OSError:
        return None
    rows, cols = size.lines, size.columns
    return (rows, cols) if rows and cols else (24, 80)


class RawTerminal:
    __slots__ = ("_before", "_fd")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before: list[Any] | None = None

    def enter(self) -> None:
        """Also after a stop, where the shell has put its own mode."""
        before = termios.tcgetattr(self._fd)
        if self._before is None:
            self._before = before
        raw = list(before)
        raw[0] &= ~(
            termios.IGNBRK
            | termios.BRKINT
            | termios.PARMRK
            | termios.ISTRIP
            | termios.INLCR
            | termios.IGNCR
            | termios.ICRNL
            | termios.IXON
        )
        raw[1] &= ~termios.OPOST
        raw[2] = (raw[2] & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
        raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        raw[6] = list(raw[6])
        raw[6][termios.VMIN] = 1
        raw[6][termios.VTIME] = 0
        termios.tcsetattr(self._fd, termios.TCSANOW, raw)

    def leave(self) -> None:
        before, self._before = self._before, None
        if before is not None:
            try:
                termios.tcsetattr(self._fd, termios.TCSANOW, before)
            except termios.error:
                return  # the terminal is gone


class LeaveEscape:
    """`Enter ~ .` as in ssh; `Enter ~ ~` is one tilde."""

    __slots__ = ("_line_start", "_tilde")

    def __init__(self) -> None:
        self._line_start = True
        self._tilde = False

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What goes to the guest, and whether the user leaves."""
        if not self._tilde and b"~" not in data:
            if data:
                self._line_start = data[-1] in b"\r\n"
            return data, False
        out = bytearray()
        for byte in data:
            if self._tilde:
                self._tilde = False
                if byte == 0x2E:
                    return bytes(out), True
                out.append(0x7E)
                if byte == 0x7E:
                    self._line_start = False
                    continue
            elif byte == 0x7E and self._line_start:
                self._tilde = True
                continue
            out.append(byte)
            self._line_start = byte in b"\r\n"
        return bytes(out), False
