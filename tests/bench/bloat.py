"""Bufferbloat between VMs: what busy connections do to the latency of others, on a VM-to-VM network and
on a plain Linux bridge with pfifo.

`python -m bench.bloat`, as root, or the section `bloat` of `make bench`. Guests are network namespaces with
a TAP as their NIC, and a program that carries frames between it and the port, as a VMM would: with a whole
guest, what is measured would be its own queue. Everything is in namespaces that end with it.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hosts import layers
from main_loop import run
from net.networks import LAN, Desk, ProcessHolders, make_port
from vmsilod.network import taps
from vmsilod.network.namespaces import run_inside

from bench.report import Row, as_p50_p99, percentile, print_section

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmsilod.network.plan import Port

PROBES = Path(__file__).parent / "probes"
SECONDS = 4.0
SLOW = 125e6  # bytes/s: a guest that takes 1 Gbit/s
OFFLOADS = 0x1 | 0x2 | 0x4 | 0x8  # linux/if_tun.h: checksums, TSO for both, ECN
GUEST_RING = 256  # frames: a virtio queue
NAMES = ("sender", "receiver", "asker", "answerer")
NO_FAIR = "fq_codel: this kernel has none, so its rows are left out; ports have the kernel's own queue"


@dataclass(frozen=True)
class Found:
    """Round trips in seconds."""

    idle: list[float]
    others: list[float]
    same: list[float]
    lost: int
    rate: float  # bytes/s


class Bench:
    """Four guests on one network, each with its pump."""

    def __init__(self, ports: tuple[Port, ...], open_port: Callable[[Port], int], *, slow: bool) -> None:
        self._stack = ExitStack()
        self._guests = ProcessHolders()
        self._ports = dict(zip(NAMES, ports, strict=True))
        run(self._guests.hold(frozenset(NAMES)))
        self._stack.callback(lambda: run(self._guests.release(frozenset(NAMES))))
        for name, port in self._ports.items():
            self._plug(name, port, open_port(port), SLOW if slow and name == "receiver" else 0)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def measure(self) -> Found:
        echoes = [self._start("answerer", "echo", "answerer"), self._start("receiver", "echo", "receiver")]
        idle, _ = self._ping("asker", "answerer")
        self._ping("sender", "receiver")
        sink = self._start("receiver", "sink", "receiver")
        flood = self._start("sender", "flood", "receiver", 3 * SECONDS, wait=False)
        others, lost_there = self._ping("asker", "answerer")
        same, lost_here = self._ping("sender", "receiver")
        _finish(flood)
        total, seconds = json.loads(_finish(sink))
        for echo in echoes:
            _end(echo)
        return Found(idle, others, same, lost_there + lost_here, total / seconds)

    def _plug(self, name: str, port: Port, fd: int, rate: float) -> None:
        namespace = run(self._guests.open(name))
        guest = run(run_inside(namespace, make_nic, port))
        os.close(namespace)
        for end in (fd, guest):
            fcntl.ioctl(end, taps.TUNSETOFFLOAD, OFFLOADS)
        argv = [sys.executable, "-I", "-S", str(PROBES / "pump.py"), str(fd), str(guest), str(rate)]
        pump = subprocess.Popen(argv, pass_fds=(fd, guest))
        self._stack.callback(_end, pump)
        os.close(fd)
        os.close(guest)

    def _address(self, name: str) -> str:
        return str(self._ports[name].addresses[0].ip)

    def _start(
        self, where: str, what: str, target: str, seconds: float = 0, *, wait: bool = True
    ) -> subprocess.Popen[str]:
        pid = str(self._guests.processes[where].pid)
        argv = ["nsenter", "-t", pid, "-n", sys.executable, "-I", "-S", str(PROBES / "flow.py")]
        process = subprocess.Popen(
            [*argv, what, self._address(target), str(seconds)], stdout=subprocess.PIPE, text=True
        )
        self._stack.callback(_end, process)
        if wait and process.stdout is not None:
            process.stdout.readline()
        return process

    def _ping(self, where: str, target: str) -> tuple[list[float], int]:
        times, lost = json.loads(_finish(self._start(where, "ping", target, SECONDS, wait=False)))
        return times, lost


def make_nic(port: Port) -> int:
    """In the guest's namespace."""
    fd = taps.create_tap("eth0", queues=1, offload=True)
    for argv in (
        ["ip", "link", "set", "eth0", "address", port.mac, "txqueuelen", str(GUEST_RING), "up"],
        ["ip", "addr", "add", str(port.addresses[0]), "dev", "eth0"],
        ["ip", "link", "set", "lo", "up"],
    ):
        subprocess.run(argv, check=True)
    return fd


def make_bridge_port(port: Port) -> int:
    """In the bridge's namespace, with what the kernel gives to a TAP, but pfifo."""
    fd = taps.create_tap(port.tap, queues=1, offload=True)
    for argv in (
        ["tc", "qdisc", "replace", "dev", port.tap, "root", "pfifo"],
        ["ip", "link", "set", port.tap, "master", "br0", "up"],
    ):
        subprocess.run(argv, check=True)
    return fd


def measure_bridge(ports: tuple[Port, ...], *, slow: bool) -> Found:
    holders = ProcessHolders()
    run(holders.hold(frozenset({LAN})))
    namespace = run(holders.open(LAN))
    try:
        bridge = [
            "ip",
            "link",
            "add",
            "br0",
            "up",
            "type",
            "bridge",
            "forward_delay",
            "0",
            "mcast_snooping",
            "0",
        ]
        run(run_inside(namespace, subprocess.check_call, bridge))
        with Bench(
            ports, lambda port: run(run_inside(namespace, make_bridge_port, port)), slow=slow
        ) as bench:
            return bench.measure()
    finally:
        os.close(namespace)
        run(holders.release(frozenset({LAN})))


def measure_switch(ports: tuple[Port, ...], *, slow: bool) -> tuple[Found, bool]:
    """And whether its ports had fq_codel."""
    with (
        Desk(*ports) as desk,
        Bench(ports, lambda port: run(desk.switches.open(port))[0], slow=slow) as bench,
    ):
        return bench.measure(), "fq_codel" in desk.inside("tc", "qdisc", "show", "dev", ports[0].tap)


def measure() -> None:
    ports = tuple(make_port(name[:8], number, offload=True) for number, name in enumerate(NAMES, 2))
    rows, notes = [], []
    for slow in (False, True):
        bridge = measure_bridge(ports, slow=slow)
        switch, fair = measure_switch(ports, slow=slow)
        if not fair:
            notes = [NO_FAIR]
        kind = "a receiver that takes 1 Gbit/s" if slow else "as fast as it goes"
        rows += compare(kind, switch, bridge)
    notes.append(
        "floor: a plain bridge with pfifo. Round trips of a datagram, p50 / p99 (worst), each 5 ms."
    )
    print_section("bufferbloat between VMs: eight TCP connections, and what others feel", rows, notes)


def compare(kind: str, switch: Found, bridge: Found) -> list[Row]:
    rows = [Row(f"{kind}: 8 busy connections", as_rate(switch), as_rate(bridge))]
    for what, name in (("nothing else", "idle"), ("two other VMs", "others"), ("the same two VMs", "same")):
        rows.append(
            Row(
                f"{kind}: round trip, {what}",
                as_times(getattr(switch, name)),
                as_times(getattr(bridge, name)),
            )
        )
    return [*rows, Row(f"{kind}: lost datagrams", str(switch.lost), str(bridge.lost))]


def as_rate(found: Found) -> str:
    return f"{found.rate * 8 / 1e9:.2f} Gbit/s"


def as_times(times: list[float]) -> str:
    return f"{as_p50_p99(times)} ({percentile(times, 1) * 1000:.0f})" if times else "none came back"


def _finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=60)
    return out


def _end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


if __name__ == "__main__":
    layers.enter_private_mounts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    measure()
