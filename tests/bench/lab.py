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
LOST_MAX = 4
VERSIONS = (
    "uname -r; qemu-system-x86_64 --version | head -n 1; echo libvirt $(virsh --version);"
    " systemd-vmspawn --version | head -n 1; crosvm --version; cloud-hypervisor --version"
)


def measure(lab: Lab, rounds: int) -> list[dict[str, Any]]:
    """A lab whose own kernel crashed (QEMU's emulation of SVM is not perfect) loses that round alone."""
    found: list[dict[str, Any]] = []
    lost = 0
    while rounds > 0:
        boot = lab.find_boot()
        try:
            measured = measure_round(lab)
        except subprocess.CalledProcessError:
            lost += 1
            if lost > LOST_MAX or not lab.recover(boot):
                raise
            print(f"the lab itself crashed ({lab.accelerator}): this round again", flush=True)
            continue
        rounds -= 1
        for way, new in zip(found or measured, measured, strict=True):
            if way is not new:
                way["cold"] += new["cold"]
                way["warm"] += new["warm"]
                way["why_not"] = way["why_not"] or new["why_not"]
        found = found or measured
    return found


def measure_round(lab: Lab) -> list[dict[str, Any]]:
    lab.run("cat > /root/lab_peers.py", input=PROBE.read_text())
    done = subprocess.run(
        lab.ssh(f"python3 /root/lab_peers.py {WARM_CALLS}"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measured: list[dict[str, Any]] = json.loads(done.stdout)
    return measured


def rows(found: list[dict[str, Any]], kind: str) -> list[Row]:
    """The floor of each is the first: vmsilo with the machine type that the others have."""
    first = found[0][kind]
    table = []
    for way in found:
        times, why = way[kind], way["why_not"]
        if not times:
            table.append(Row(f"{kind}: {way['name']}", f"not measured: {why or 'no round came to its end'}"))
            continue
        floor = as_ratio(median(times), median(first)) if first else ""
        shown = f"{median(times):.2f} s ({min(times):.2f} to {max(times):.2f}, {len(times)} times)"
        table.append(Row(f"{kind}: {way['name']}", shown, f"{median(first):.2f} s" if first else "", floor))
        if why:
            table.append(Row(f"{kind}: {way['name']}", f"then failed: {why}"))
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
