"""Section 1: one warm `vm-run NAME true`, against the same without a process start, and against the bare
channel.

All of them in turn, round by round, so that whatever else the machine does meets them alike.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import vmsilo_wire as wire
from agent_client import Client

from bench.ground import PYTHON, VM
from bench.processes import read_cpu
from bench.report import Row, as_difference, as_p50_p99, as_ratio, in_ms, median, print_section

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bench.ground import Ground

ROUNDS = 20
PER_ROUND = 10
CPU_CALLS = 150
COMMAND = ["vm-run", VM, "true"]
HOST_COST_AIM = 0.025  # seconds, of CPU as well as of latency, Python's own start included
RELAY_AIM = 0.002  # seconds; everything but the client's start
UNITS = {
    "vmsilo-relayd": "vmsilo-relayd.service",
    "vhost-device-vsock": f"vmsilo-{VM}-vsock.service",
    "vmsilod": "vmsilod.service",
}


@dataclass
class Times:
    """Seconds each."""

    call: list[float] = field(default_factory=list)
    python: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    echo: list[float] = field(default_factory=list)
    relay: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)


def measure(ground: Ground) -> None:
    ground.start_vm()
    times = Times()
    command_socket = ground.reach(f"/run/vmsilo/{VM}-command.socket")
    device_socket = ground.reach(f"/run/vmsilo/vm/{VM}/vsock/vsock")
    with dial_relay(command_socket) as ready:
        ready.settimeout(30)
        for _ in range(ROUNDS):
            call, python = ground.spawn_times(COMMAND, [*PYTHON, "-c", "pass"], rounds=PER_ROUND)
            times.call += [entry[1] for entry in call]
            times.python += [entry[1] for entry in python]
            times.resident += repeat(lambda: spawn_true(command_socket))
            times.echo += repeat(lambda: echo(ready))
            times.relay += repeat(lambda: dial_relay(command_socket).close())
            times.device += repeat(lambda: dial_device(device_socket).close())
    print_section(
        f"1. Warm `vm-run {VM} true` ({len(times.call)} of each, in turn; p50 / p99, differences of p50)",
        [*latency_rows(times), *cpu_rows(ground)],
    )


def repeat(action: Callable[[], object]) -> list[float]:
    found = []
    for _ in range(PER_ROUND):
        begin = time.monotonic()
        action()
        found.append(time.monotonic() - begin)
    return found


def latency_rows(times: Times) -> list[Row]:
    call, python, resident = median(times.call), median(times.python), median(times.resident)
    relay = median(times.relay) - median(times.device)
    # What the host adds: the client's process, and the relay beyond the bare channel.
    host = call - resident + relay
    return [
        Row(
            "whole call; floor: the same from a resident client",
            as_p50_p99(times.call),
            as_p50_p99(times.resident),
            f"{as_ratio(call, resident)}, {as_difference(call - resident)}",
        ),
        Row(
            "whole call; floor: PING and PONG on an open connection",
            as_p50_p99(times.call),
            as_p50_p99(times.echo),
            as_ratio(call, median(times.echo)),
        ),
        Row(
            "client's process (call less resident); floor: python3 -I -S -c pass",
            in_ms(call - resident),
            as_p50_p99(times.python),
            as_difference(call - resident - python),
        ),
        Row(
            "relay: connect to descriptor in hand; floor: CONNECT at the device",
            as_p50_p99(times.relay),
            as_p50_p99(times.device),
            as_difference(relay),
            "+2 ms",
            relay <= RELAY_AIM,
        ),
        Row(
            "latency of the host side: client's process and relay",
            in_ms(host),
            in_ms(python),
            as_difference(host - python),
            "25 ms",
            host <= HOST_COST_AIM,
        ),
    ]


def cpu_rows(ground: Ground) -> list[Row]:
    pids = {name: ground.find_pid(unit) for name, unit in UNITS.items()}
    before = {name: read_cpu(ground.proc, pid) for name, pid in pids.items()}
    call, python = ground.spawn_times(COMMAND, [*PYTHON, "-c", "pass"], rounds=CPU_CALLS)
    spent = {name: (read_cpu(ground.proc, pid) - before[name]) / len(call) for name, pid in pids.items()}
    client = sum(entry[2] for entry in call) / len(call)
    floor = sum(entry[2] for entry in python) / len(python)
    total = client + sum(spent.values())
    parts = ", ".join(f"{name} {seconds * 1000:.2f}" for name, seconds in spent.items())
    return [
        Row(
            f"CPU of the host side per call (mean of {len(call)}): vm-run {client * 1000:.2f}, {parts}",
            in_ms(total),
            in_ms(floor),
            as_difference(total - floor),
            "25 ms",
            total <= HOST_COST_AIM,
        )
    ]


def dial_relay(path: Path) -> socket.socket:
    """As vm-run does it: a connection to the agent that the relay has said HELLO on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(path))
        sock.send(b'{"v":1,"op":"connect","wait":30}')
        while True:
            data, fds, _flags, _address = socket.recv_fds(sock, 4096, 1)
            if fds:
                return socket.socket(fileno=fds[0])
            if not data or b'"error"' in data:
                raise ConnectionError(f"the relay said {data!r}")


def dial_device(path: Path) -> socket.socket:
    """The bare channel to the agent's port."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(path))
    sock.sendall(b"CONNECT %d\n" % wire.AGENT_PORT)
    if not sock.recv(64).startswith(b"OK "):
        raise ConnectionError("the device gave no OK")
    return sock


def spawn_true(path: Path) -> None:
    with Client(dial_relay(path)) as client:
        client.spawn("true")
        client.started()
        client.send(wire.STDIN)
        client.expect(wire.EXIT)


def echo(ready: socket.socket) -> None:
    ready.sendall(wire.encode_frame(wire.PING, b"ping"))
    wanted = wire.HEADER_SIZE + 4
    while wanted:
        data = ready.recv(wanted)
        if not data:
            raise ConnectionError("the agent closed")
        wanted -= len(data)
