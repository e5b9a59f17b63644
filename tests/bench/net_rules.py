"""Section 5: what the firewall costs a packet, without rules and with those of 1, 100 and 500 VMs; and what
it costs to load them. In a network namespace of its own; `python -m bench.net_rules` is this section alone.

One process is the guest: it writes frames to a TAP, and the kernel has done all of its work on a frame when
the write returns. So the time and the CPU of the writes are those of the whole way through the host.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from ipaddress import ip_interface, ip_network

from net import packets
from net.rules_world import INTERNET, A, World
from net.tap_ground import run
from vmsilod.network import nft
from vmsilod.network.plan import Allow, NetworkPlan
from vmsilod.network.ruleset import render_ruleset

from bench.report import Row, as_ratio, in_ms, median, print_section

ROUNDS = 5
FRAMES = 20_000
VMS = (1, 100, 500)
MOST_SECONDS = 240
# What NAT costs any host: connection tracking and one rule.
NAT_ALONE = """
table ip alone {
	chain postrouting { type nat hook postrouting priority srcnat; policy accept; oifname "wan" masquerade; }
}
"""
SINK = """\
table inet sink { chain in { type filter hook prerouting priority -400; udp dport 7000 drop; }; }"""
NONE, ALONE = "no rules", "masquerading alone"


@dataclass
class Found:
    """Of each round: frames in a second, and microseconds of CPU for one."""

    rate: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def measure() -> None:
    """Raises CalledProcessError or TimeoutExpired."""
    command = ["unshare", "--net", "--mount", "--", sys.executable, "-m", "bench.net_rules"]
    subprocess.run(command, check=True, timeout=MOST_SECONDS)


def make_plan(number: int) -> NetworkPlan:
    """VMs like A, the measured one the last of them; each may reach something of its own."""
    others = (
        replace(
            A,
            vm=f"vm{index}",
            tap=f"vm{index}-0",
            mac=f"02:00:00:01:{index >> 8:02x}:{index & 255:02x}",
            host_addresses=(ip_interface(f"10.{64 + (index >> 8)}.{index & 255}.254/24"),),
            addresses=(ip_interface(f"10.{64 + (index >> 8)}.{index & 255}.1/24"),),
        )
        for index in range(number - 1)
    )
    opened = (Allow(ip_network("192.168.1.0/24")), Allow(ip_network("192.168.2.7"), "tcp", (80, 90)))
    return NetworkPlan(tuple(replace(port, allow=opened) for port in (*others, A)), "wan")


def load(what: str | int) -> float:
    """Seconds."""
    run("nft", "flush", "ruleset")
    begin = time.monotonic()
    if isinstance(what, int):
        plan = make_plan(what)
        text = render_ruleset(plan, nft.look_around(plan))
        begin = time.monotonic()
        nft.apply(text)
    elif what == ALONE:
        subprocess.run(["nft", "-f", "-"], input=NAT_ALONE, text=True, check=True)
    return time.monotonic() - begin


def send(world: World, frame: bytes) -> tuple[float, float]:
    fd = world.taps[A.tap].fd
    cpu, begin = time.process_time(), time.monotonic()
    for _ in range(FRAMES):
        os.write(fd, frame)
    return FRAMES / (time.monotonic() - begin), (time.process_time() - cpu) / FRAMES * 1e6


def main() -> None:
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "sysfs", "sysfs", "/sys"], check=True)
    taps = "".join(f"tuntap add {port.tap} mode tap\n" for port in make_plan(VMS[-1]).ports[:-1])
    subprocess.run(["ip", "-batch", "-"], input=taps, text=True, check=True)
    setups: tuple[str | int, ...] = (NONE, ALONE, *VMS)
    found: dict[tuple[str | int, str], Found] = {}
    loads: dict[str | int, list[float]] = {}
    with ExitStack() as stack:
        world = stack.enter_context(World(A))
        there = world.internet()
        # Nobody listens: what arrives ends there at once, without an answer.
        with there.entered():
            run("nft", SINK)
        frames = {
            "to the internet": packets.udp(world.way(A, INTERNET), 4000, 7000),
            "denied": packets.udp(world.way(A, "10.200.0.1"), 4000, 7000),
            "spoofed": packets.udp(world.way(A, INTERNET, source="10.0.1.9"), 4000, 7000),
        }
        for _ in range(ROUNDS):
            for setup in setups:
                loads.setdefault(setup, []).append(load(setup))
                for what, frame in frames.items():
                    if isinstance(setup, int) or what == "to the internet":
                        rate, cpu = send(world, frame)
                        each = found.setdefault((setup, what), Found())
                        each.rate.append(rate)
                        each.cpu.append(cpu)
    show(found, loads)


def show(found: dict[tuple[str | int, str], Found], loads: dict[str | int, list[float]]) -> None:
    rows = []
    for (setup, what), values in found.items():
        aim = isinstance(setup, int) and setup != VMS[0]
        floor = found[VMS[0], what] if aim else found[NONE, "to the internet"]
        name = f"rules of {setup} VMs" if isinstance(setup, int) else setup
        grown = median(values.cpu) / median(floor.cpu)
        rows.append(
            Row(
                f"{what}, {name}; floor: {'rules of 1 VM' if aim else NONE}",
                f"{median(values.rate) / 1000:.0f} k/s, {median(values.cpu):.2f} us CPU",
                f"{median(floor.rate) / 1000:.0f} k/s, {median(floor.cpu):.2f} us CPU",
                as_ratio(median(values.cpu), median(floor.cpu)),
                "x 1.2" if aim else "",
                grown <= 1.2 if aim else None,
            )
        )
    rows += [Row(f"loading the rules of {number} VMs", in_ms(median(loads[number]))) for number in VMS]
    print_section(
        f"5. The firewall: one frame of a guest ({ROUNDS} rounds of {FRAMES}, in turn; medians)", rows
    )


if __name__ == "__main__":
    main()
