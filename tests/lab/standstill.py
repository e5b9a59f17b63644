"""Guests that stand still: now and then a vCPU under QEMU's emulation of SVM gets no interrupt any more, and
spins in one place of its kernel for ever. That says nothing of vmsilo, and would cost a test its whole time.

A thread of the lab's pytest looks at where vCPUs are when the host interrupts them; one that is nowhere else
for a minute has its VMM killed, and a mark has the part run again.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections import defaultdict
from pathlib import Path

TRACING = Path("/sys/kernel/tracing")
EVENT = TRACING / "events/kvm/kvm_exit/enable"
MARK = Path("/run/lab-standstill")
PERIOD = 20  # seconds between two looks of one second
LOOKS = 4
FEWEST = 20  # exits in a look: the emulated host's timer alone makes a hundred
PLACES = 2  # a loop of the two pieces that the emulator makes of it
LINE = re.compile(r"-(\d+) .* kvm_exit: vcpu \d+ reason (\S+) rip (0x[0-9a-f]+)")


def is_emulated() -> bool:
    return "QEMU TCG" in Path("/proc/cpuinfo").read_text()


class Watch(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over = threading.Event()

    def run(self) -> None:
        if not EVENT.exists():
            subprocess.run(["mount", "-t", "tracefs", "tracefs", str(TRACING)], check=False)
        still: dict[int, tuple[set[str], int]] = {}
        while not self._over.wait(PERIOD):
            before, still = still, {}
            for thread, places in self._look().items():
                known, count = before.get(thread, (set(), 0))
                if len(known | places) <= PLACES:
                    still[thread] = (known | places, count + 1)
                    if count + 1 == LOOKS:
                        end(thread, known | places)

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _look(self) -> dict[int, set[str]]:
        """Where each vCPU that only the host's interrupts have stopped was, by thread."""
        (TRACING / "trace").write_text("")
        EVENT.write_text("1")
        self._over.wait(1)
        EVENT.write_text("0")
        return find_still((TRACING / "trace").read_text(errors="replace"))


def find_still(trace: str) -> dict[int, set[str]]:
    exits: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for thread, reason, place in LINE.findall(trace):
        exits[int(thread)].append((reason, place))
    return {
        thread: {place for _, place in seen}
        for thread, seen in exits.items()
        if len(seen) >= FEWEST and all(reason == "interrupt" for reason, _ in seen)
    }


def end(thread: int, places: set[str]) -> None:
    status = Path(f"/proc/{thread}/status").read_text()
    (vmm,) = re.findall(r"^Tgid:\s+(\d+)", status, re.MULTILINE)
    command = Path(f"/proc/{vmm}/comm").read_text().strip()
    MARK.write_text(f"a guest of {command} stood still at {' and '.join(sorted(places))}\n")
    os.kill(int(vmm), signal.SIGKILL)
