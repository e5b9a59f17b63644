"""Section 4: memory and idle CPU of the resident processes, with 1 and with 100 configured VMs, and how long
it takes until 100 more files are 100 listening sockets.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from bench.processes import read_cpu, read_memory
from bench.report import Row, print_section

if TYPE_CHECKING:
    from bench.ground import Ground

VMS = 100
IDLE_SECONDS = 15.0  # a watchdog period
SETTLE_SECONDS = 3.0
LISTEN_SECONDS = 120.0
UNITS = {"vmsilod": "vmsilod.service", "vmsilo-relayd": "vmsilo-relayd.service"}
AIMS = {"vmsilod": 60.0, "vmsilo-relayd": 15.0}  # MB of RSS
LISTENING = "00010000"  # __SO_ACCEPTCON in the flags of /proc/net/unix


class Footprint(NamedTuple):
    rss: float
    pss: float
    idle: float  # seconds of CPU per second


class Spread(NamedTuple):
    seconds: float
    reloads: int
    systemd_cpu: float
    vmsilod_cpu: float


class Found:
    """Collected over the whole run, because its states come at different times of it."""

    def __init__(self) -> None:
        self.states: list[tuple[str, dict[str, Footprint]]] = []

    def look(self, ground: Ground, state: str) -> None:
        time.sleep(SETTLE_SECONDS)
        pids = {name: ground.find_pid(unit) for name, unit in UNITS.items()}
        before = {name: read_cpu(ground.proc, pid) for name, pid in pids.items()}
        time.sleep(IDLE_SECONDS)
        found = {}
        for name, pid in pids.items():
            idle = (read_cpu(ground.proc, pid) - before[name]) / IDLE_SECONDS
            found[name] = Footprint(*read_memory(ground.proc, pid), idle)
        self.states.append((state, found))


def measure_first(ground: Ground, found: Found) -> None:
    """Before anything else was done."""
    found.look(ground, "1 VM configured, none ever started")
    ground.start_vm()
    found.look(ground, "1 VM configured and running")


def measure_last(ground: Ground, found: Found) -> None:
    spread = spread_out(ground)
    found.look(ground, f"{VMS} VMs configured, 1 running, after all of the above")
    rows = []
    for state, footprints in found.states:
        for name, footprint in footprints.items():
            rows.append(
                Row(
                    f"{name}: {state}",
                    f"RSS {footprint.rss:.1f} MB, PSS {footprint.pss:.1f} MB",
                    "",
                    f"idle {footprint.idle * 1000:.2f} ms/s",
                    f"{AIMS[name]:.0f} MB",
                    footprint.rss < AIMS[name],
                )
            )
    rows.append(
        Row(
            f"{VMS - 1} more files written until {VMS} sockets listen",
            f"{spread.seconds:.2f} s",
            "",
            f"{spread.reloads} daemon-reloads, CPU of systemd {spread.systemd_cpu:.2f} s, "
            f"of vmsilod {spread.vmsilod_cpu:.2f} s",
        )
    )
    print_section("4. Memory and idle CPU", rows)


def spread_out(ground: Ground) -> Spread:
    folder = ground.reach("/etc/vmsilo/vms.d")
    vmsilod = ground.find_pid("vmsilod.service")
    reloads = count_reloads(ground)
    before = read_cpu(ground.proc, 1), read_cpu(ground.proc, vmsilod)
    begin = time.monotonic()
    for number in range(1, VMS):
        partial = folder / f".vm{number}"
        partial.write_text("memory = 512\n")
        partial.rename(folder / f"vm{number}.toml")
    while count_listening(ground) < VMS:
        if time.monotonic() - begin > LISTEN_SECONDS:
            raise TimeoutError(f"{count_listening(ground)} of {VMS} sockets listen")
        time.sleep(0.01)
    seconds = time.monotonic() - begin
    time.sleep(SETTLE_SECONDS)
    after = read_cpu(ground.proc, 1), read_cpu(ground.proc, vmsilod)
    return Spread(seconds, count_reloads(ground) - reloads, after[0] - before[0], after[1] - before[1])


def count_listening(ground: Ground) -> int:
    paths = set()
    for line in (ground.proc / "1/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == LISTENING and fields[-1].endswith("-command.socket"):
            paths.add(fields[-1])
    return len(paths)


def count_reloads(ground: Ground) -> int:
    lines = ground.host.run(["journalctl", "-q", "-o", "cat", "_PID=1"]).stdout.splitlines()
    return sum(line.startswith("Reloading finished") for line in lines)
