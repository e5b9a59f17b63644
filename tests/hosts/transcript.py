"""Commands of a demo with their real output, printed as a terminal would show them.

Used by demo.py and demo_lab.py; it runs what `argv` makes of a command, in whatever host that is.
"""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

from hosts import layers

if TYPE_CHECKING:
    from collections.abc import Callable


class Transcript:
    """`argv(command, user)` is the command line on this machine that runs a shell command over there."""

    def __init__(self, argv: Callable[[str, str], list[str]]) -> None:
        self._argv = argv
        self._begin = time.monotonic()
        self.failed = 0

    def show(self, command: str, *, user: str = layers.USER, expect: int = 0) -> None:
        print(f"\n{'#' if user == 'root' else '$'} {command}", flush=True)
        begin = time.monotonic()
        argv = self._argv(command, user)
        status = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, check=False
        ).returncode
        note = f"exit status {status}, " if status or expect else ""
        print(f"  [{note}{time.monotonic() - begin:.2f} s]", flush=True)
        if status != expect:
            self.failed += 1
            print(f"  UNEXPECTED: the status should have been {expect}", flush=True)

    def close(self) -> int:
        """Say how it went; the exit status of the demo."""
        verdict = f"{self.failed} commands FAILED" if self.failed else "as expected"
        layers.say(f"demo: {verdict}, {time.monotonic() - self._begin:.0f} s in all")
        return 1 if self.failed else 0
