"""Log lines of relayd for the journal: standard error with the priority in front.

A guest or a client can provoke lines at will, so lines are limited per subject (a VM's name, or "relayd").
Never raises: a log that can't be written is dropped.
"""

from __future__ import annotations

import os
import time

ERROR, WARNING, INFO = 3, 4, 6
LINES = 10
WINDOW = 60.0  # seconds


class Journal:
    def __init__(self) -> None:
        self._spent: dict[str, tuple[float, int]] = {}

    def log(self, priority: int, subject: str, text: str) -> None:
        """Write one line about `subject`, at most LINES in WINDOW seconds for each."""
        now = time.monotonic()
        since, count = self._spent.get(subject, (now, 0))
        if now - since >= WINDOW:
            if count > LINES:
                self._write(priority, f"{subject}: {count - LINES} further messages suppressed")
            since, count = now, 0
        self._spent[subject] = (since, count + 1)
        if count < LINES:
            self._write(priority, f"{subject}: {text}")

    def forget(self, subject: str) -> None:
        self._spent.pop(subject, None)

    @staticmethod
    def _write(priority: int, text: str) -> None:
        line = text.encode("ascii", "backslashreplace").replace(b"\n", b"\\n")
        try:
            os.write(2, b"<%d>%s\n" % (priority, line[:1000]))
        except OSError:
            return  # nowhere left to say it
