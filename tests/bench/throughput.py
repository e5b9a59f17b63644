"""Section 3: bytes through vm-run, against a bare copy over the same kind of socket, both in turn.

With the guest, where an emulated CPU is the limit; and without it, the real agent and the real client's
session over a Unix socket, where the host's CPUs are.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hosts import layers

from bench.ground import LIBDIR, PROBES, PYTHON, SCRATCH, VM
from bench.report import Row, median, print_section

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.ground import Ground

ROUNDS = 3
AIM = 0.9
SECONDS = 5.0  # of one transfer
MOST = 1 << 30
STEP = 4 << 20
BLOCK = 256 * 1024
WINDOW = 1 << 20
PORT = 5100
TRANSFER_SECONDS = 60
SECRET = "0123456789abcdef" * 4
MODES = {
    "guest to host": ("send", "vm-run {vm} head -c {size} /dev/zero >/dev/null"),
    "host to guest": ("receive", "head -c {size} /dev/zero | vm-run {vm} sh -c 'cat >/dev/null'"),
    "there and back": ("echo", "head -c {size} /dev/zero | vm-run {vm} cat >/dev/null"),
}
# What the guest runs for a floor: $0 is the program, $1 its mode, $3 the size.
COPY = 'python3 -I -S -c "$0" "$@"'
GUEST_LINES = {"pipe-send": f'head -c "$3" /dev/zero | {COPY}', "pipe-receive": f"{COPY} | cat >/dev/null"}
# What is measured, and the same pipes with two bare copiers between them.
DIRECT = {
    "out": (
        "{run} head -c {size} /dev/zero >/dev/null",
        "head -c {size} /dev/zero | {copy} pipes >/dev/null",
    ),
    "in": (
        "head -c {size} /dev/zero | {run} sh -c 'cat >/dev/null'",
        "head -c {size} /dev/zero | {copy} pipes | cat >/dev/null",
    ),
}
BARE = "{copy} bare {size}"


def measure(ground: Ground) -> None:
    ground.start_vm()
    notes = [f"A warm start is part of each transfer. Each is the median of {ROUNDS}, in turn."]
    rows = [row for mode in MODES for row in measure_guest(ground, mode)]
    with agent(ground):
        rows += [row for way in DIRECT for row in measure_direct(ground, way)]
    print_section("3. Throughput", rows, notes)


def measure_guest(ground: Ground, mode: str) -> list[Row]:
    copy_mode, line = MODES[mode]

    def ours(size: int) -> float:
        return run_line(ground, line.format(vm=VM, size=size))

    def copier(name: str) -> Callable[[int], float]:
        return lambda size: copy_bare(ground, name, size)

    floors = {"bare vsock": copier(copy_mode)}
    if copy_mode != "echo":
        floors["bare vsock with the same pipe in the guest"] = copier(f"pipe-{copy_mode}")
    return compare(f"{mode} through `vm-run`", find_size(ours, 8 << 20), ours, floors)


def measure_direct(ground: Ground, way: str) -> list[Row]:
    line, pipes_line = DIRECT[way]
    python = " ".join(PYTHON)
    words = {
        "run": f"{python} {SCRATCH}/direct_run.py {LIBDIR} {SCRATCH}/agent.sock {SECRET}",
        "copy": f"{python} {SCRATCH}/socket_copy.py",
    }

    def timer(text: str) -> Callable[[int], float]:
        return lambda size: run_line(ground, text.format(size=size, **words))

    ours = timer(line)
    floors = {"bare Unix socket": timer(BARE), "two bare copiers with the same pipes": timer(pipes_line)}
    return compare(
        f"agent and client without a VM, {way}", find_size(ours, 256 << 20, MOST * 4), ours, floors
    )


def compare(
    what: str, size: int, ours: Callable[[int], float], floors: dict[str, Callable[[int], float]]
) -> list[Row]:
    mine, *others = alternate(size, ours, *floors.values())
    return [
        Row(
            f"{what}, {size >> 20} MiB; floor: {name}",
            as_rate(size, mine),
            as_rate(size, floor),
            f"x {floor / mine:.2f}",
            f"x {AIM}",
            floor / mine >= AIM,
        )
        for name, floor in zip(floors, others, strict=True)
    ]


def alternate(size: int, *ways: Callable[[int], float]) -> list[float]:
    """The median seconds of each way."""
    found: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS):
        for times, way in zip(found, ways, strict=True):
            times.append(way(size))
    return [median(times) for times in found]


def find_size(transfer: Callable[[int], float], trial: int, most: int = MOST) -> int:
    """What takes about SECONDS, by a trial."""
    size = int(trial / transfer(trial) * SECONDS)
    return max(STEP, min(most, size // STEP * STEP))


def as_rate(size: int, seconds: float) -> str:
    return f"{size / seconds / 1e6:.0f} MB/s"


def run_line(ground: Ground, line: str) -> float:
    ((found,),) = ground.spawn_times(["sh", "-c", line], seconds=TRANSFER_SECONDS)
    return found[1]


def copy_bare(ground: Ground, mode: str, size: int) -> float:
    """Seconds from the guest's connection until all bytes are where they belong."""
    path = ground.reach(f"/run/vmsilo/vm/{VM}/vsock/vsock_{PORT}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        try:
            path.chmod(0o777)  # the device has the VM's uid
            listener.listen(1)
            listener.settimeout(TRANSFER_SECONDS)
            source = (PROBES / "guest_copy.py").read_text()
            line = GUEST_LINES.get(mode, COPY)
            words = ["vm-run", VM, "sh", "-c", line, source, mode, str(PORT), str(size)]
            program = ground.host.popen(
                words, user=layers.USER, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
            try:
                guest = listener.accept()[0]
                with guest:
                    seconds = time_copy(guest, mode, size)
                if program.wait(TRANSFER_SECONDS):
                    raise RuntimeError(f"the guest's copy failed with status {program.returncode}")
            finally:
                program.kill()
                program.wait()
        finally:
            path.unlink()
    return seconds


def time_copy(guest: socket.socket, mode: str, size: int) -> float:
    guest.settimeout(TRANSFER_SECONDS)
    begin = time.monotonic()
    if mode.endswith("send"):
        receive(guest, size)
    elif mode.endswith("receive"):
        send(guest, size)
        receive(guest, 1)
    else:
        send_and_receive(guest, size)
    return time.monotonic() - begin


def send(guest: socket.socket, left: int) -> None:
    block = memoryview(bytearray(BLOCK))
    while left:
        left -= guest.send(block[:left])


def send_and_receive(guest: socket.socket, size: int) -> None:
    """With at most WINDOW bytes under way, as in vm-run."""
    block = memoryview(bytearray(BLOCK))
    poll = select.poll()
    unsent = unreceived = size
    guest.settimeout(0)
    while unreceived:
        room = min(WINDOW - (unreceived - unsent), unsent)
        poll.register(guest, select.POLLIN | (select.POLLOUT if room else 0))
        events = poll.poll(TRANSFER_SECONDS * 1000)
        if not events:
            raise TimeoutError("the guest is silent")
        if events[0][1] & ~select.POLLOUT:
            count = guest.recv_into(block)
            if not count:
                raise ConnectionError("the guest closed")
            unreceived -= count
        if events[0][1] & select.POLLOUT:
            unsent -= guest.send(block[:room])


def receive(guest: socket.socket, left: int) -> None:
    block = memoryview(bytearray(BLOCK))
    while left:
        count = guest.recv_into(block[: min(left, BLOCK)])
        if not count:
            raise ConnectionError("the guest closed")
        left -= count


@contextmanager
def agent(ground: Ground) -> Iterator[None]:
    """The real agent as a service of the container, on a Unix socket."""
    host = ground.host
    host.write(f"{SCRATCH}/secret", SECRET)
    unit = f"bench-agent-{os.getpid()}"
    options = f"--listen unix:{SCRATCH}/agent.sock --secret-file {SCRATCH}/secret --announce none"
    start = f"systemd-run -q --unit={unit} -p Type=notify -p Delegate=yes -p UMask=0000"
    host.run(f"{start} {LIBDIR}/guest/vmsilo_agent/vmsilo-agent {options} --user {layers.USER}")
    try:
        yield
    finally:
        host.run(f"systemctl stop {unit}; rm -f {SCRATCH}/agent.sock", check=False)
