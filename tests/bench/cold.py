"""Section 2: a cold `vm-run NAME true`, against the bare VMM with the same arguments, kernel and image.

Ours and bare in turn. Beside the whole times stand the two parts in which vmsilo can lose any, because a
boot's own time varies by more than what is looked for.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from hosts import layers

from bench.ground import LIBDIR, SCRATCH, VM
from bench.report import Row, as_difference, as_ratio, in_ms, median, print_section

if TYPE_CHECKING:
    from pathlib import Path

    from bench.ground import Ground

PAIRS = 5
BOOT_SECONDS = 90
AIM_PART, AIM_SECONDS = 0.05, 0.150  # overhead: at most one of these
SERVICE = f"vmsilo-{VM}-vm.service"
VSOCK_SERVICE = f"vmsilo-{VM}-vsock.service"
BARE = f"{SCRATCH}/vm"


class Start(NamedTuple):
    """Seconds from the request."""

    vmm: float  # until the VMM is executed
    ready: float  # until the guest said that it is ready
    whole: float  # until `true` had ended


@dataclass
class Original:
    """What vmsilo started, as procfs shows it: enough to start the same without vmsilo."""

    argv: list[str]
    device: list[str]
    fds: dict[int, int] = field(default_factory=dict)
    monitor: int = -1
    secret: str = ""

    def close(self) -> None:
        fds, self.fds = self.fds, {}
        for fd in fds.values():
            os.close(fd)


def measure(ground: Ground) -> None:
    ground.start_vm()
    original = copy_original(ground)
    ours, bare = [], []
    try:
        for _ in range(PAIRS):
            ground.host.run(["vm-stop", VM], user=layers.USER)
            ours.append(start_ours(ground))
            ground.host.run(["vm-stop", VM], user=layers.USER)
            bare.append(start_bare(ground, original))
    finally:
        original.close()
    print_section(
        f"2. Cold start to the end of `true` ({PAIRS} pairs, in turn; medians)",
        rows(ours, bare),
        [
            "whole, ours: " + " ".join(f"{start.whole:.2f}" for start in ours) + " s",
            "whole, bare: " + " ".join(f"{start.whole:.2f}" for start in bare) + " s",
        ],
    )


def rows(ours: list[Start], bare: list[Start]) -> list[Row]:
    whole, floor = median([start.whole for start in ours]), median([start.whole for start in bare])
    most = max(AIM_SECONDS, floor * AIM_PART)
    vmm, bare_vmm = median([start.vmm for start in ours]), median([start.vmm for start in bare])
    end = median([start.whole - start.ready for start in ours])
    bare_end = median([start.whole - start.ready for start in bare])
    added = vmm - bare_vmm + end - bare_end
    return [
        Row(
            f"`vm-run {VM} true` of a stopped VM; floor: bare VMM",
            f"{whole:.2f} s",
            f"{floor:.2f} s",
            f"{as_ratio(whole, floor)}, {as_difference(whole - floor)}",
            f"+{most * 1000:.0f} ms (5 % or 150 ms)",
            whole - floor <= most,
        ),
        Row("request until the VMM executes", in_ms(vmm), in_ms(bare_vmm), as_difference(vmm - bare_vmm)),
        Row(
            "guest ready until `true` ended, both by a socket",
            in_ms(end),
            in_ms(bare_end),
            as_difference(end - bare_end),
        ),
        Row(
            "these two together: what the host side adds",
            "",
            "",
            as_difference(added),
            "+150 ms",
            added <= AIM_SECONDS,
        ),
    ]


def start_ours(ground: Ground) -> Start:
    ((begin, whole, _cpu, _status),) = ground.spawn_times(["vm-run", VM, "true"], seconds=BOOT_SECONDS)[0]
    active = int(ground.show(SERVICE, "ActiveEnterTimestampMonotonic")) / 1e6
    said = [
        int(entry["__MONOTONIC_TIMESTAMP"]) / 1e6
        for entry in ground.journal_json("vmsilo-relayd.service", begin)
        if entry["MESSAGE"] == f"{VM}: ready"
    ]
    return Start(active - begin, said[-1] - begin, whole)


def start_bare(ground: Ground, original: Original) -> Start:
    ground.host.run(["install", "-d", BARE])
    request = {
        "argv": original.argv,
        "fds": original.fds,
        "monitor": original.monitor,
        "device": original.device,
        "directory": BARE,
        "secret": original.secret,
        "wire": f"{LIBDIR}/guest",
        "seconds": BOOT_SECONDS,
    }
    try:
        done = subprocess.run(
            ground.host.argv([*ground.probe("bare_vm"), json.dumps(request)]),
            pass_fds=tuple(original.fds.values()),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BOOT_SECONDS + 10,
            check=False,
        )
    finally:
        ground.host.run(["rm", "-rf", BARE])
    if done.returncode:
        raise RuntimeError(f"the bare VMM failed: {done.stderr}")
    return Start(*json.loads(done.stdout))


def copy_original(ground: Ground) -> Original:
    """From the running VM; its initrd with the secret in it is copied, so that it outlives the VM."""
    pid = ground.find_pid(SERVICE)
    vsock = f"/run/vmsilo/vm/{VM}/vsock"
    argv = [word.replace(vsock, BARE) for word in read_argv(ground.proc, pid)]
    device = [word.replace(vsock, BARE) for word in read_argv(ground.proc, ground.find_pid(VSOCK_SERVICE))]
    original = Original(argv, device)
    text = "\n".join(argv)
    original.monitor = int(match(r"^socket,id=mon0,fd=(\d+),", text))
    kernel, initrd, disk = (
        int(match(pattern, text))
        for pattern in (
            r"^-kernel\n/proc/self/fd/(\d+)$",
            r"^-initrd\n/proc/self/fd/(\d+)$",
            r"^fd=(\d+),set=",
        )
    )
    opened = ground.proc / str(pid) / "fd"
    original.fds[kernel] = os.open(opened / str(kernel), os.O_RDONLY)
    original.fds[disk] = os.open(find_sibling(opened, opened / str(kernel)), os.O_RDONLY)
    data = (opened / str(initrd)).read_bytes()
    original.fds[initrd] = os.memfd_create("initrd")
    with open(original.fds[initrd], "wb", closefd=False) as copy:
        copy.write(data)
    original.secret = match(r"vmsilo/secret\x00+([0-9a-f]{64})", data.decode("latin-1"))
    return original


def find_sibling(opened: Path, kernel: Path) -> Path:
    """The image's root file: QEMU has it under another number than it was given."""
    link = kernel.readlink()
    for path in opened.iterdir():
        other = path.readlink()
        if other.parent == link.parent and other != link:
            return path
    raise RuntimeError(f"the running VM has no other file of {link.parent} open")


def read_argv(proc: Path, pid: int) -> list[str]:
    return (proc / str(pid) / "cmdline").read_text().split("\0")[:-1]


def match(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the running VM shows nothing that matches {pattern}")
    return found[1]
