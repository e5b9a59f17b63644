"""The test host with stand-in VMs: defining VMs, running clients, and comparing what is left with what was.

Used by the fixtures in tests/host. One Site per session; `leave` after each test gives back every VM that it
defined.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from image_tree import FIRST, version_files
from vmsilo_image import cpio

from hosts.layers import USER

if TYPE_CHECKING:
    import subprocess

    from hosts.container import Container, Result

HERE = Path(__file__).parent
LIB = "/usr/local/lib/standin"
PROGRAMS = {
    "vmm.py": "/usr/local/bin/qemu-system-x86_64",
    "device.py": "/usr/local/bin/vhost-device-vsock",
    "guest.py": f"{LIB}/guest.py",
    "guest-systemctl": f"{LIB}/systemctl",
    "inventory.py": f"{LIB}/inventory.py",
}
VMS = "/etc/vmsilo/vms.d"
SETTLE_SECONDS = 15


@dataclass
class Before:
    """What a test found."""

    inventory: dict[str, Any]
    defined: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)


class Site:
    """`host` for what is not about VMs."""

    def __init__(self, host: Container) -> None:
        self.host = host
        self._numbers = itertools.count(1)
        self._before = Before({})
        self._daemons: dict[str, Any] = {}  # what they hold when everything was used once

    def install(self) -> None:
        self.host.run(["mkdir", "-p", LIB])
        for source, target in PROGRAMS.items():
            self.host.write(target, (HERE / source).read_text(), mode=0o755)
        self.make_image("default")

    def make_image(self, name: str, version: str = FIRST) -> str:
        """A version as `vmsilo image build` leaves it, of nothing that could boot; current from here on.
        Returns its folder."""
        image = f"/var/lib/vmsilo/images/{name}"
        initrd = cpio.newc_archive([cpio.regular("init", b"stand-in")])
        files = {"vmlinuz": b"kernel", "root.erofs": b"root " + version.encode(), "initrd": initrd}
        for file, data in version_files(version, files, disks=True).items():
            self.host.write(f"{image}/{version}/{file}", data.decode("ascii"))
        self.host.run(f"ln -s {version} {image}/.new && mv -T {image}/.new {image}/current")
        return f"{image}/{version}"

    # VMs

    def define(self, text: str = "", *, mode: str = "", name: str = "", wait: bool = True) -> str:
        """A VM of its own for the test, known to vmsilod when this returns; `mode` is the stand-in's."""
        name = name or f"vm{next(self._numbers)}"
        params = [f"standin.mode={mode}"] if mode else []
        if params:
            text = f"kernel_params = {json.dumps(params)}\n{text}"
        self._before.defined.append(name)
        self.host.write(f"{VMS}/{name}.toml", text)
        if wait:
            self.wait_for_socket(name)
        return name

    def wait_for_socket(self, name: str) -> None:
        self.host.wait_until(f"systemctl -q is-active vmsilo-{name}.socket", seconds=20)

    def vm_run(self, name: str, *command: str, user: str = USER, **options: Any) -> Result:
        options.setdefault("check", False)
        options.setdefault("timeout", 60)
        return self.host.run(["vm-run", name, *command], user=user, **options)

    def spawn(self, *command: str, user: str = USER, **options: Any) -> subprocess.Popen[bytes]:
        return self.host.popen(list(command), user=user, **options)

    def show(self, name: str) -> dict[str, Any]:
        return self.host.vms()[name]

    def state(self, name: str) -> str:
        return str(self.show(name)["State"])

    def wait_for_state(self, name: str, *states: str, seconds: float = 20) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while (vm := self.host.vms().get(name, {})).get("State") not in states:
            if time.monotonic() > deadline:
                raise AssertionError(f"VM {name} is {vm.get('State')}, not {states}, after {seconds:g} s")
            time.sleep(0.05)
        return vm

    def unit(self, name: str, *properties: str, suffix: str = "vm") -> dict[str, str]:
        out = self.host.run(["systemctl", "show", f"--property={','.join(properties)}", unit(name, suffix)])
        return dict(line.split("=", 1) for line in out.stdout.splitlines())

    def main_pid(self, name: str) -> int:
        return int(self.unit(name, "MainPID")["MainPID"])

    def journal_of(self, name: str) -> str:
        return self.host.run(["journalctl", "-q", "--no-pager", "-o", "cat", "-u", unit(name)]).stdout

    def daemon_pid(self, unit_name: str) -> int:
        return int(self.host.run(["systemctl", "show", "-P", "MainPID", unit_name]).stdout)

    def running(self, mode: str = "", text: str = "") -> str:
        """A VM that runs."""
        name = self.define(text, mode=mode)
        done = self.vm_run(name, "true")
        assert done.returncode == 0, done.stderr
        return name

    # Before and after

    def arrive(self) -> None:
        self._before = Before(self._inventory())
        self._daemons = self._daemons or self._before.inventory["daemons"]

    def expect(self, pattern: str) -> None:
        """An error line in the journal of our units that this test provokes."""
        self._before.expected.append(pattern)

    def leave(self) -> list[str]:
        """End and remove what the test defined; returns what is left over, and what went wrong unasked."""
        before = self._before
        for name in before.defined:
            up = f"systemctl -q is-active {unit(name)} || systemctl -q is-active {unit(name, 'debug')}"
            if not self.host.run(up, check=False).returncode:
                self.host.run(["vm-stop", "--force", name], check=False, timeout=60)
        paths = [f"{VMS}/{name}.toml{end}" for name in before.defined for end in ("", ".d")]
        if paths:
            self.host.run(["rm", "-rf", *paths])
        deadline = time.monotonic() + SETTLE_SECONDS
        while left := self._compare(before.inventory, self._inventory()):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return left + self._unexpected_lines(before)

    def _inventory(self) -> dict[str, Any]:
        out = self.host.run(["/usr/bin/python3", "-IS", f"{LIB}/inventory.py"]).stdout
        result: dict[str, Any] = json.loads(out)
        return result

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
        found = [
            f"{kind}: {item}"
            for kind, items in now["left"].items()
            for item in items
            if item not in before["left"][kind]
        ]
        if now["stored"] > before["stored"]:
            found.append(f"the daemons' descriptor stores have {now['stored']}, had {before['stored']}")
        for daemon, held in now["daemons"].items():
            was = self._daemons[daemon]
            if not held["pid"]:
                found.append(f"{daemon} does not run")
            for kind, count in held["fds"].items():
                if count > was["fds"].get(kind, 0):
                    found.append(
                        f"{daemon} has {count} descriptors of {kind}, had {was['fds'].get(kind, 0)}"
                    )
        return found

    def _unexpected_lines(self, before: Before) -> list[str]:
        cursor = before.inventory["cursor"]
        out = self.host.run(
            ["journalctl", "-q", "-o", "json", "-u", "vmsilo*", f"--after-cursor={cursor}"]
        ).stdout
        found = []
        tail = 0  # lines of a traceback still to show: the journal has each by itself
        for line in out.splitlines():
            entry = json.loads(line)
            text = entry["MESSAGE"] if isinstance(entry["MESSAGE"], str) else str(entry["MESSAGE"])
            bad = int(entry.get("PRIORITY", 6)) <= 3 or "Traceback" in text
            tail = 12 if "Traceback" in text else tail - 1
            if (bad or tail > 0) and not any(re.search(pattern, text) for pattern in before.expected):
                found.append(f"journal: {entry.get('SYSLOG_IDENTIFIER')}: {text}")
        return found


def unit(name: str, suffix: str = "vm") -> str:
    return f"vmsilo-{name}-{suffix}.service"
