"""What the second to last VM of one image costs, by how its root is given to it: host memory, the guest's
own page cache, and the time to boot.

Only when named: `python -m bench hugepages`. VMSILO_BENCH_VMS=N measures with fewer than eight VMs.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, NamedTuple

from hosts import layers
from huge_host import drop_plain_image, make_plain_image, open_sysfs
from vmsilod.hugepages import pool

from bench.report import Row, median, print_section

if TYPE_CHECKING:
    from bench.ground import Ground

VMS = int(os.environ.get("VMSILO_BENCH_VMS", "8"))
MEMORY = 512  # MiB of each guest
WAYS = {
    "page cache, disk": 'hugepages = false, device = "disk"',
    "page cache, persistent memory (DAX)": 'hugepages = false, device = "pmem"',
    "huge pages, disk": 'hugepages = true, device = "disk", keep = 0',
    "huge pages, persistent memory (DAX)": 'hugepages = true, device = "pmem", keep = 0',
}
USE = "cat /usr/bin/* /usr/lib/x86_64-linux-gnu/*.so* >/dev/null 2>&1; grep ^Cached: /proc/meminfo"


class Vm(NamedTuple):
    """MiB. `own`: memory of the VMM that no other process has."""

    own: float
    cached: float
    boot: float  # seconds from vm-start to the guest's word that it is ready


def measure(ground: Ground) -> None:
    pages_before = pool.read_counters().persistent
    pages = make_plain_image(ground.host)
    open_sysfs(ground.host)
    rows = []
    try:
        floor: list[Vm] = []
        for way, options in WAYS.items():
            before = pool.read_counters().persistent
            found = measure_way(ground, options)
            taken = pool.read_counters().persistent - before
            stop(ground)
            floor = floor or found
            rows.append(make_row(way, found, floor, taken << 1))
    finally:
        stop(ground)
        drop_plain_image(ground.host)
        pool.set_persistent(pages_before)
    title = f"VMs 2 to {VMS} of one image ({MEMORY} MiB each; root {pages << 1} MiB, not compressed)"
    note = (
        "Own: Private_Clean and Private_Dirty of the VMM (smaps_rollup) after the guest has read /usr/bin"
        " and its libraries; the guest's page cache is in it. Medians."
    )
    print_section(title, rows, [note])


def measure_way(ground: Ground, options: str) -> list[Vm]:
    names = [f"huge{number}" for number in range(VMS)]
    for name in names:
        text = f'memory = {MEMORY}\ncpus = 1\nimage = {{name = "plain", {options}}}\n'
        ground.host.write(f"/etc/vmsilo/vms.d/{name}.toml", text)
        ground.host.wait_until(f"systemctl -q is-active vmsilo-{name}.socket")
    boots = []
    for name in names:
        begin = time.monotonic()
        ground.host.run(["vm-start", name, "--wait"], user=layers.USER)
        boots.append(time.monotonic() - begin)
    cached = [read_cached(ground, name) for name in names]
    own = [read_own(ground, name) for name in names]
    return [Vm(*values) for values in zip(own, cached, boots, strict=True)]


def read_cached(ground: Ground, name: str) -> float:
    shown = ground.host.run(["vm-run", name, "sh", "-c", USE], user=layers.USER).stdout
    fields = dict(line.split(":") for line in shown.splitlines())
    return int(fields["Cached"].split()[0]) / 1024


def read_own(ground: Ground, name: str) -> float:
    pid = ground.find_pid(f"vmsilo-{name}-vm.service")
    total = 0
    for line in (ground.proc / str(pid) / "smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            total += int(line.split()[1])
    return total / 1024


def stop(ground: Ground) -> None:
    for number in range(VMS):
        ground.host.run(
            f"vm-stop --force huge{number}; rm -f /etc/vmsilo/vms.d/huge{number}.toml", check=False
        )


def make_row(way: str, found: list[Vm], floor: list[Vm], shared: int) -> Row:
    """Without the first VM, which pays for what all share."""
    own, cached, boot = (median([vm[field] for vm in found[1:]]) for field in range(3))
    first = median([vm.own for vm in floor[1:]])
    return Row(
        way,
        f"own {own:.0f} MiB, of that page cache of the guest {cached:.0f} MiB; boot {boot:.1f} s",
        f"own {first:.0f} MiB",
        f"{own - first:+.0f} MiB each; huge pages for all: {shared} MiB",
    )
