"""What the measurements ran on, and how busy it was meanwhile."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.ground import Ground


def describe_machine(ground: Ground) -> str:
    vmm = ground.host.run("qemu-system-x86_64 --version | head -n 1").stdout.strip()
    python = ground.host.run(["python3", "--version"]).stdout.strip()
    systemd = ground.host.run("systemctl --version | head -n 1").stdout.strip()
    return f"{describe_host()}; in the container host {systemd}, {python}, {vmm}"


def describe_host() -> str:
    model = _find_field("/proc/cpuinfo", "model name")
    memory = int(_find_field("/proc/meminfo", "MemTotal").split()[0]) / 2**20
    return f"{os.cpu_count()} CPUs {model}, {memory:.0f} GiB, kernel {platform.release()}"


def describe_load() -> str:
    return "load average " + " ".join(f"{value:.2f}" for value in os.getloadavg())


def _find_field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "0"
