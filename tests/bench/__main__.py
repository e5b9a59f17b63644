"""`make bench`: prints the tables of all sections; as root, within twelve minutes, leaving nothing behind.

With arguments, only these sections: warm, cold, throughput, memory.
"""

from __future__ import annotations

import signal
import sys
import time
from typing import TYPE_CHECKING

from hosts import layers
from hosts.container import Container

from bench import cold, footprint, throughput, warm
from bench.ground import VM, VM_CONFIG, Ground
from bench.machine import describe_load, describe_machine

if TYPE_CHECKING:
    from types import FrameType

MOST_SECONDS = 12 * 60
SECTIONS = ("warm", "cold", "throughput", "memory")


def measure(ground: Ground, sections: tuple[str, ...]) -> None:
    print(f"\n{describe_machine(ground)}\nbegin: {describe_load()}", flush=True)
    footprints = footprint.Found()
    if "memory" in sections:
        footprint.measure_first(ground, footprints)
    if "warm" in sections:
        warm.measure(ground)
    if "cold" in sections:
        cold.measure(ground)
    if "throughput" in sections:
        throughput.measure(ground)
    if "memory" in sections:
        footprint.measure_last(ground, footprints)


def main() -> None:
    sections = tuple(sys.argv[1:]) or SECTIONS
    if not set(sections) <= set(SECTIONS):
        sys.exit(f"usage: bench [{'|'.join(SECTIONS)}]...")
    layers.enter_private_mounts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGALRM, run_out)
    with Container() as host:
        host.configure(**{VM: VM_CONFIG})
        ground = Ground(host)
        signal.alarm(MOST_SECONDS)  # building what was not cached does not count
        begin = time.monotonic()
        try:
            measure(ground, sections)
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            print(f"end: {describe_load()}, after {time.monotonic() - begin:.0f} s", flush=True)
            signal.alarm(0)


def run_out(_number: int, _frame: FrameType | None) -> None:
    raise TimeoutError(f"not done after {MOST_SECONDS} s")


if __name__ == "__main__":
    main()
