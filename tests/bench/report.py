"""The tables that a run prints: measured, floor, how they compare, and whether the aim is met."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER = ("what", "measured", "floor", "compared", "aim", "met")


@dataclass(frozen=True)
class Row:
    """`met` is None where there is no aim."""

    what: str
    measured: str
    floor: str = ""
    compared: str = ""
    aim: str = ""
    met: bool | None = None

    def cells(self) -> tuple[str, ...]:
        met = {None: "", True: "yes", False: "NO"}[self.met]
        return (self.what, self.measured, self.floor, self.compared, self.aim, met)


def print_section(title: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
    """A Markdown table, so that it can be pasted into docs/performance.md."""
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    print(f"\n## {title}\n")
    for index, line in enumerate(lines):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if index == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    busy = " ".join(f"{value:.2f}" for value in os.getloadavg())
    for note in (*notes, f"load average at the end of this section: {busy}"):
        print(f"\n{note}")
    print(flush=True)


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least `part` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def in_ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def as_p50_p99(values: Sequence[float]) -> str:
    return f"{median(values) * 1000:.1f} / {percentile(values, 0.99) * 1000:.1f} ms"


def as_difference(seconds: float) -> str:
    return f"{seconds * 1000:+.1f} ms"


def as_ratio(measured: float, floor: float) -> str:
    return f"x {measured / floor:.2f}"
