"""Where the measurements are made: the container host with one VM, and how to look and reach into it.

Made once by `main`, on a container that it owns. Probes run in the container; sockets and procfs are reached
from outside through the container's root, so that no process has to be started for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hosts import layers

if TYPE_CHECKING:
    from hosts.container import Container

PROBES = Path(__file__).parent / "probes"
LIBDIR = "/usr/local/lib/vmsilo"
SCRATCH = "/run/bench"
PYTHON = ("/usr/bin/python3", "-I", "-S")
VM = "demo"
VM_CONFIG = "memory = 1024\ncpus = 2\n"


class Ground:
    def __init__(self, host: Container) -> None:
        self.host = host
        self.leader = host._leader  # the container's PID 1, in our numbers
        self.proc = self.reach("/proc")
        host.run(["install", "-d", "-m", "755", "-o", layers.USER, SCRATCH])
        for probe in PROBES.glob("*.py"):
            (self.reach(SCRATCH) / probe.name).write_text(probe.read_text())

    def reach(self, path: str) -> Path:
        """A path of the container, as seen from outside."""
        return Path(f"/proc/{self.leader}/root") / path.lstrip("/")

    def probe(self, name: str) -> list[str]:
        """The start of a probe's command line in the container."""
        return [*PYTHON, f"{SCRATCH}/{name}.py"]

    def spawn_times(
        self, *commands: list[str], rounds: int = 1, seconds: float = 60
    ) -> list[list[list[float]]]:
        """Per command and round [begin, seconds, CPU seconds, status]; every status must be 0."""
        request = json.dumps({"commands": commands, "rounds": rounds, "seconds": seconds})
        argv = [*self.probe("spawn_times"), request]
        found: list[list[list[float]]] = json.loads(self.host.run(argv, user=layers.USER).stdout)
        for times, command in zip(found, commands, strict=True):
            if any(time[3] for time in times):
                raise RuntimeError(f"{command} failed: {times}")
        return found

    def start_vm(self) -> None:
        self.host.run(["vm-start", VM, "--wait"], user=layers.USER)

    def find_pid(self, unit: str) -> int:
        """The unit's main process, in the container's numbers."""
        return int(self.show(unit, "MainPID"))

    def show(self, unit: str, name: str) -> str:
        return self.host.run(["systemctl", "show", "-P", name, unit]).stdout.strip()

    def journal_json(self, unit: str, since: float) -> list[dict[str, Any]]:
        """Entries of a unit from `since` on, a moment of the monotonic clock in seconds."""
        lines = self.host.run(
            ["journalctl", "-q", "-o", "json", "-n", "200", "-u", unit]
        ).stdout.splitlines()
        entries = [json.loads(line) for line in lines]
        return [entry for entry in entries if int(entry["__MONOTONIC_TIMESTAMP"]) >= since * 1e6]
