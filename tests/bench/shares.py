"""Section 9: a shared directory by its cache mode, a disk and the overlay of the root, beside the host's own
file system; the same program everywhere, in turn.

In the container host all files are in memory, so what is measured is the way, not a disk.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hosts import layers

from bench.ground import PROBES
from bench.report import Row, as_ratio, median, print_section

if TYPE_CHECKING:
    from bench.ground import Ground

NAME = "sharing"
ROUNDS = 3
MODES = ("auto", "always", "never")
SHARE = '{{ path = "/srv/share-{mode}", tag = "{mode}", cache = "{mode}" }}'
CONFIG = f"""\
memory = 1024
cpus = 2
shared_home = false
shared_directories = [{", ".join(SHARE.format(mode=mode) for mode in MODES)}]
[[additional_disks]]
path = "/srv/bench.img"
create = {{ size = "512M" }}
mount = "/data"
"""
PLACES = {
    "a disk (virtio-blk, ext4)": "/data",
    "the root's overlay (virtio-blk, ext4)": "/var/tmp",
    **{f'shared_directories, cache = "{mode}"': f"/mnt/{mode}" for mode in MODES},
}
WORKS = ("write", "read", "random write", "random read")
Rates = dict[str, float]


def measure(ground: Ground) -> None:
    host = ground.host
    folders = " ".join(f"/srv/share-{mode}" for mode in (*MODES, "host"))
    host.run(f"install -d -o {layers.USER} {folders}")
    host.write(f"/etc/vmsilo/vms.d/{NAME}.toml", CONFIG)
    host.wait_until(f"test -S /run/vmsilo/{NAME}-command.socket", seconds=20)
    try:
        host.run(["vm-start", NAME, "--wait"], user=layers.USER)
        found: dict[str, list[Rates]] = {place: [] for place in (*PLACES, "host")}
        for _ in range(ROUNDS):
            found["host"].append(run_here(ground))
            for place, path in PLACES.items():
                found[place].append(run_there(ground, path))
    finally:
        host.run(["vm-stop", "--force", NAME], user=layers.USER, check=False)
        host.run(f"rm -r /etc/vmsilo/vms.d/{NAME}.toml {folders}; rm -f /srv/bench.img")
    floors = {work: median([rates[work] for rates in found["host"]]) for work in WORKS}
    rows = [
        Row(
            f"{place}: {work}",
            f"{(rate := median([rates[work] for rates in found[place]])):.1f} MB/s",
            f"{floors[work]:.0f} MB/s",
            as_ratio(rate, floors[work]),
        )
        for work in WORKS
        for place in PLACES
    ]
    print_section(f"9. Files of 64 MiB, in one go and in random pages ({ROUNDS} rounds; medians)", rows)


def run_here(ground: Ground) -> Rates:
    return read_rates(
        ground.host.run([*ground.probe("file_io"), "/srv/share-host"], user=layers.USER).stdout
    )


def run_there(ground: Ground, path: str) -> Rates:
    argv = ["vm-run", NAME, "python3", "-I", "-S", "-", path]
    text = (PROBES / "file_io.py").read_text()
    return read_rates(ground.host.run(argv, user=layers.USER, input=text).stdout)


def read_rates(text: str) -> Rates:
    rates: Rates = json.loads(text)
    return rates
