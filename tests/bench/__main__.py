"""`make bench`: prints the tables of all sections; as root, within twelve minutes, leaving nothing behind.

With arguments, only these sections: warm, cold, throughput, memory, rules, taps, bloat, disposables, shares;
and hugepages, which is measured only when it is named.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from hosts import layers
from hosts.container import Container

from bench import bloat, cold, disposables, footprint, hugepages, net_rules, shares, taps, throughput, warm
from bench.ground import VM, VM_CONFIG, Ground
from bench.machine import describe_load, describe_machine

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

MOST_SECONDS = 12 * 60
SECTIONS = ("warm", "cold", "throughput", "memory", "rules", "taps", "bloat", "disposables", "shares")
BY_NAME = ("hugepages",)  # takes as long as all others together


def measure(ground: Ground, sections: tuple[str, ...]) -> list[str]:
    """The sections that failed; a failed one does not keep the others from being measured."""
    footprints = footprint.Found()
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("memory", lambda: footprint.measure_first(ground, footprints)),
        ("warm", lambda: warm.measure(ground)),
        ("cold", lambda: cold.measure(ground)),
        ("disposables", lambda: disposables.measure(ground)),
        ("shares", lambda: shares.measure(ground)),
        ("throughput", lambda: throughput.measure(ground)),
        ("memory", lambda: footprint.measure_last(ground, footprints)),
        ("rules", net_rules.measure),
        ("taps", taps.measure),
        ("bloat", bloat.measure),
        ("hugepages", lambda: hugepages.measure(ground)),
    )
    failed = []
    for section, step in steps:
        if section in sections:
            try:
                step()
            except (OSError, RuntimeError, AssertionError, subprocess.TimeoutExpired) as error:
                print(f"\n{section}: FAILED: {error!r}", flush=True)
                failed.append(section)
    return failed


def main() -> None:
    sections = tuple(sys.argv[1:]) or SECTIONS
    if not set(sections) <= {*SECTIONS, *BY_NAME}:
        sys.exit(f"usage: bench [{'|'.join((*SECTIONS, *BY_NAME))}]...")
    layers.enter_private_mounts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGALRM, run_out)
    with Container() as host:
        host.configure(**{VM: VM_CONFIG})
        ground = Ground(host)
        signal.alarm(MOST_SECONDS)  # building what was not cached does not count
        begin = time.monotonic()
        print(f"\n{describe_machine(ground)}\nbegin: {describe_load()}", flush=True)
        try:
            failed = measure(ground, sections)
        finally:
            print(f"end: {describe_load()}, after {time.monotonic() - begin:.0f} s", flush=True)
            signal.alarm(0)
    if failed:
        sys.exit(f"bench: {', '.join(failed)} failed")


def run_out(_number: int, _frame: FrameType | None) -> None:
    sys.exit(f"bench: not done after {MOST_SECONDS} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
