"""CPU time and memory of processes, as procfs tells them. Reads only; `proc` is the root of a procfs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def read_cpu(proc: Path, pid: int) -> float:
    """Seconds of CPU that the live threads of a process have used, to the nanosecond."""
    tasks = (proc / str(pid) / "task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def read_memory(proc: Path, pid: int) -> tuple[float, float]:
    """(RSS, PSS) in MB of 10^6 bytes."""
    fields = {}
    for line in (proc / str(pid) / "smaps_rollup").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in {"Rss", "Pss"}:
            fields[key] = int(value.split()[0]) * 1024 / 1e6
    return fields["Rss"], fields["Pss"]
