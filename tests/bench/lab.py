"""`make lab-bench`: vmsilo beside libvirt and systemd-vmspawn in the lab, all in one run: prints one table.

As root, leaving nothing behind. Not below `make bench`: the lab is a machine of its own with KVM, and only
ratios of its numbers mean anything where its CPUs are emulated.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosts import layers
from hosts.lab import prepare
from hosts.lab_layers import make_lab, make_vmspawn
from hosts.lab_machine import Lab

from bench.machine import describe_host, describe_load
from bench.report import Row, as_ratio, median, print_section

PROBE = Path(__file__).parent / "probes/lab_peers.py"
ROUNDS = 3
WARM_CALLS = 7  # in each round
TRIES = 2
VERSIONS = (
    "uname -r; qemu-system-x86_64 --version | head -n 1; echo libvirt $(virsh --version);"
    " systemd-vmspawn --version | head -n 1; crosvm --version; cloud-hypervisor --version"
)


@dataclass
class Measured:
    """Times in seconds."""

    name: str
    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    why_not: str = ""
    crashes: int = 0


def measure(lab: Lab, rounds: int) -> list[Measured]:
    """In each round every way is measured once, in turn: one VM runs at a time."""
    lab.run("cat > /root/lab_peers.py", input=PROBE.read_text())
    ways = [Measured(name) for name in ask_probe(lab, "names")]
    for _ in range(rounds):
        for number, way in enumerate(ways):
            measure_way(lab, number, way)
    return ways


def measure_way(lab: Lab, number: int, way: Measured) -> None:
    """A lab whose own kernel crashed (QEMU's emulation of SVM is not perfect) gets another try."""
    for _ in range(TRIES):
        boot = lab.find_boot()
        try:
            times = ask_probe(lab, f"{number} {WARM_CALLS}")
        except subprocess.CalledProcessError:
            if not lab.recover(boot):
                raise
            print(f"the lab itself crashed ({lab.accelerator}) with {way.name}: again", flush=True)
            way.crashes += 1
            continue
        way.cold += times["cold"]
        way.warm += times["warm"]
        way.why_not = way.why_not or times["why_not"]
        return


def ask_probe(lab: Lab, arguments: str) -> Any:
    command = lab.ssh(f"python3 /root/lab_peers.py {arguments}")
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def rows(found: list[Measured], kind: str) -> list[Row]:
    """The floor of each is the first: vmsilo with the machine type that the others have."""
    first = getattr(found[0], kind)
    table = []
    for way in found:
        times, why = getattr(way, kind), way.why_not
        if way.crashes:
            why += f"{'; ' if why else ''}the lab crashed {way.crashes} times meanwhile"
        name = f"{kind}: {way.name}"
        if not times:
            table.append(Row(name, f"not measured: {why or 'it came to no end'}"))
            continue
        floor = as_ratio(median(times), median(first)) if first else ""
        shown = f"{median(times):.2f} s ({min(times):.2f} to {max(times):.2f}, {len(times)} times)"
        table.append(Row(name, shown, f"{median(first):.2f} s" if first else "", floor))
        if why:
            table.append(Row(name, f"also: {why}"))
    return table


def main() -> None:
    if sys.argv[1:] and not sys.argv[1].isdecimal():
        sys.exit("usage: bench.lab [ROUNDS]")
    rounds = int(sys.argv[1]) if sys.argv[1:] else ROUNDS
    layers.enter_private_mounts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parts, vmspawn = make_lab(bench=True), make_vmspawn()
    with Lab(parts) as lab:
        prepare(lab)
        lab.push(vmspawn / "root", "/")
        lab.run("sync")
        begin = time.monotonic()
        versions = lab.run(VERSIONS, check=False).stdout.strip().replace("\n", "; ")
        print(f"\n{describe_host()}; the lab's CPUs: {lab.accelerator}; in it {versions}")
        print(f"begin: {describe_load()}", flush=True)
        found = measure(lab, rounds)
        print_section(
            "In the lab: `true` in the same image (medians, in turn; floor: the first line)",
            [*rows(found, "cold"), *rows(found, "warm")],
        )
        print(f"end: {describe_load()}, after {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
