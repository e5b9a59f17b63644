"""A program of the test host on a pseudoterminal, with a person's fingers and eyes."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import termios
import time
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from hosts.container import Container


class Terminal(AbstractContextManager["Terminal"]):
    """`shown` is all that the program wrote, as the terminal got it."""

    def __init__(self, host: Container, command: list[str], *, user: str = "user") -> None:
        self.shown = b""
        self._stack = ExitStack()
        self._master, slave = os.openpty()
        self._stack.callback(lambda: os.close(self._master))
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        try:
            self.process = subprocess.Popen(
                host.argv(command, user=user),
                stdin=slave,
                stdout=slave,
                stderr=slave,
                start_new_session=True,
            )
        finally:
            os.close(slave)
        self._stack.callback(self._end)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def resize(self, rows: int, cols: int) -> None:
        """Heard by a program whose controlling terminal this is (`setsid -c`)."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def hang_up(self) -> None:
        """Close the window: the program's terminal is gone."""
        master, self._master = self._master, os.open(os.devnull, os.O_RDONLY)
        os.close(master)

    def read_until(self, text: bytes, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            if not self._read(deadline):
                raise AssertionError(f"{text!r} did not come: {self.shown[-2000:]!r}")

    def wait(self, seconds: float = 30) -> int:
        """The exit status, after everything that was written was read."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: the last slave is closed
            return False
        self.shown += data
        return bool(data)
