"""A terminal of the tests' own with a program on it; used by tests/unit/test_client*.py."""

import fcntl
import os
import select
import struct
import subprocess
import termios
import time

from client_host import WAIT


class Terminal:
    """A program on a terminal of its own, and the person before it."""

    def __init__(
        self, argv: list[str], *, env: dict[str, str] | None = None, stdin: int | None = None
    ) -> None:
        self.master, slave = os.openpty()
        self.screen = b""
        self.resize(24, 80)
        self._slave = slave  # kept, so that the modes can be read when the program is gone
        self.modes = termios.tcgetattr(slave)

        def take() -> None:
            os.setsid()
            fcntl.ioctl(1, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            argv,
            stdin=slave if stdin is None else stdin,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color", **(env or {})},
            preexec_fn=take,
        )

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT)
        os.close(self.master)
        os.close(self._slave)

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def read_until(self, text: bytes) -> bytes:
        """Everything seen since the start, when `text` has appeared in it."""
        deadline = time.monotonic() + WAIT
        while text not in self.screen:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.master], [], [], max(left, 0))
            assert ready, f"{text!r} did not appear; seen: {self.screen!r}"
            self.screen += os.read(self.master, 65536)
        return self.screen

    def wait(self) -> int:
        """The exit status; reads the screen meanwhile."""
        deadline = time.monotonic() + WAIT
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"the program did not end; seen: {self.screen!r}"
            self._drain(0.02)
        self._drain(0)
        return self.process.returncode

    def current_modes(self) -> list[object]:
        modes: list[object] = termios.tcgetattr(self._slave)
        return modes

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self._slave)[3] & termios.ICANON

    def wait_raw(self) -> None:
        deadline = time.monotonic() + WAIT
        while not self.is_raw():
            assert time.monotonic() < deadline, f"the terminal did not become raw; seen: {self.screen!r}"
            time.sleep(0.005)

    def _drain(self, wait: float) -> None:
        while select.select([self.master], [], [], wait)[0]:
            self.screen += os.read(self.master, 65536)
            wait = 0
