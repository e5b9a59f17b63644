"""What a person sees of a build: one moving line on a terminal, one line per phase elsewhere. Owned by
build; lives as long as it. Never prints what a tool wrote, for that may come from a package.
"""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass, field
from typing import TextIO

# Share of the whole, from builds on an emulated and on a real machine; only the bar's evenness depends on
# it.
WEIGHTS = {"lists": 10, "download": 12, "unpack": 30, "install": 35, "configure": 3, "pack": 8, "publish": 2}
TITLES = {
    "lists": "fetching package lists",
    "download": "downloading packages",
    "unpack": "installing the essential packages",
    "install": "installing packages",
    "configure": "configuring the system",
    "pack": "writing the root image",
    "publish": "publishing",
}
REDRAW_SECONDS = 0.1


@dataclass
class Progress:
    stream: TextIO
    label: str
    _phase: str | None = None
    _fraction: float = 0.0
    _drawn: float = 0.0
    _started: float = field(default_factory=time.monotonic)

    def begin(self, phase: str) -> None:
        if phase == self._phase:
            return
        self._phase = phase
        self._fraction = 0.0
        self._drawn = 0.0
        if self.stream.isatty():
            self._draw()
        else:
            self.stream.write(f"{self.label}: {TITLES[phase]}\n")
            self.stream.flush()

    def advance(self, fraction: float) -> None:
        self._fraction = max(self._fraction, min(fraction, 1.0))
        if self.stream.isatty() and time.monotonic() - self._drawn >= REDRAW_SECONDS:
            self._draw()

    def done(self) -> None:
        """Leaves the terminal's line empty for what is printed next."""
        if self.stream.isatty():
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def total(self) -> float:
        """0 to 1 over all phases."""
        if self._phase is None:
            return 0.0
        names = list(WEIGHTS)
        before = sum(WEIGHTS[name] for name in names[: names.index(self._phase)])
        return (before + WEIGHTS[self._phase] * self._fraction) / sum(WEIGHTS.values())

    def _draw(self) -> None:
        assert self._phase is not None
        self._drawn = time.monotonic()
        seconds = int(self._drawn - self._started)
        text = f" {self.total():4.0%} {seconds // 60}:{seconds % 60:02d} {TITLES[self._phase]}"
        width = max(0, min(30, shutil.get_terminal_size().columns - len(text) - len(self.label) - 4))
        full = round(width * self.total())
        bar = f" [{'#' * full}{'-' * (width - full)}]" if width >= 5 else ""
        self.stream.write(f"\r\x1b[K{self.label}{bar}{text}")
        self.stream.flush()


MARKS = (
    ("running apt-get update", "lists"),
    ("downloading packages with apt", "download"),
    ("extracting archives", "unpack"),
    ("installing remaining packages", "install"),
)
# How many lines each package has in a phase: fetched, unpacked, set up.
LINES = {"download": 1, "unpack": 2, "install": 3}
NEWLY = re.compile(r"(\d+) newly installed")


class BootstrapOutput:
    """Turns mmdebstrap's --verbose lines into progress. Anything it does not know it leaves alone."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._phase = ""
        self._steps = 0
        self._packages = 0

    def feed(self, line: str) -> None:
        if line.startswith("I: "):
            for mark, phase in MARKS:
                if mark in line:
                    self._phase = phase
                    self._steps = 0
                    self._progress.begin(phase)
            return
        count = NEWLY.search(line)
        if count:
            self._packages = int(count[1])
        elif self._phase in LINES and line.startswith(("Get:", "Unpacking ", "Setting up ")):
            self._steps += 1
            if self._packages:
                self._progress.advance(self._steps / (LINES[self._phase] * self._packages))
