"""The kernel's pool of huge pages of 2 MiB, as sysfs has it (Documentation/admin-guide/mm/hugetlbpage.rst).

Called by the store in the worker. The pool belongs to the whole host: it is only ever changed by a
difference, and "persistent" pages, which are what a number written to it means, leave out the surplus that
comes and goes by itself. Holds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmsilod.hugepages.errors import NoHugepages

SYSFS = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
COMPACT = Path("/proc/sys/vm/compact_memory")


@dataclass(frozen=True)
class Counters:
    total: int
    free: int
    reserved: int
    """Of the free ones, those that a mapping may claim at any time."""
    surplus: int

    @property
    def persistent(self) -> int:
        return self.total - self.surplus

    @property
    def available(self) -> int:
        return max(0, self.free - self.reserved)


def read_counters(sysfs: Path = SYSFS) -> Counters:
    try:
        names = ("nr_hugepages", "free_hugepages", "resv_hugepages", "surplus_hugepages")
        return Counters(*(int((sysfs / name).read_text()) for name in names))
    except OSError as error:
        raise NoHugepages(f"this kernel has no huge pages of 2 MiB ({sysfs}: {error.strerror})") from error


def read_available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that programs can get without swapping."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def set_persistent(count: int, sysfs: Path = SYSFS) -> None:
    """The kernel does what it can: read back what came of it."""
    try:
        (sysfs / "nr_hugepages").write_text(str(max(0, count)))
    except OSError as error:
        raise NoHugepages(f"the kernel's huge pages cannot be changed: {error.strerror}") from error


def grow(target: int, sysfs: Path = SYSFS, compact: Path = COMPACT) -> None:
    """Ask for `target` persistent pages; where memory is in too small pieces, once more after compaction."""
    set_persistent(target, sysfs)
    if read_counters(sysfs).persistent >= target:
        return
    try:
        compact.write_text("1")
    except OSError:
        return  # a kernel without compaction
    set_persistent(target, sysfs)
