"""Fixtures of the lab tier. These tests run inside the lab host, as its root, by its own Python; elsewhere
they are not collected.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lab import standstill

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG = Path("/etc/vmsilo/vms.d")
IN_LAB = Path("/etc/hostname").read_text().strip() == "lab"
Result = subprocess.CompletedProcess[str]
VMMS = {
    "qemu-microvm": ("qemu-system-x86_64", 'vmm = "qemu"\nqemu.machine = "microvm"\n'),
    "qemu-q35": ("qemu-system-x86_64", 'vmm = "qemu"\nqemu.machine = "q35"\n'),
    "crosvm": ("crosvm", 'vmm = "crosvm"\n'),
    "cloud-hypervisor": ("cloud-hypervisor", 'vmm = "cloud-hypervisor"\n'),
}
"""Each VMM: its program, and the lines of a VM's file that choose it."""
ON_PCI = {name: how for name, how in VMMS.items() if name != "qemu-microvm"}
"""Those whose devices are on PCI. Networks of microvm are seen in the container host."""
FOREIGN = {name: how for name, how in VMMS.items() if not name.startswith("qemu")}

if not IN_LAB:
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leaving: last before the shutdown; what it starts is left running")
    config.addinivalue_line("markers", "second: after the reboot of the lab")


class Host:
    """The lab host, as its administrator and its user see it."""

    def run(self, command: str, *, user: str = "root", check: bool = True, **options: Any) -> Result:
        """A shell command of root or of the desktop user."""
        argv = ["sh", "-c", command]
        if user != "root":
            argv = [
                *("setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"),
                *("env", f"HOME=/home/{user}", f"USER={user}", *argv),
            ]
        options.setdefault("timeout", 600)
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        done: Result = subprocess.run(argv, capture_output=True, text=True, check=False, **options)
        if check and done.returncode:
            raise AssertionError(
                f"{command} exited with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            )
        return done

    def read(self, command: str, **options: Any) -> str:
        return self.run(command, **options).stdout.strip()

    def define(self, name: str, text: str) -> None:
        """Configure a VM and wait until vmsilo has taken it over. It has no more CPUs than the lab: where
        that has one, a second of the VM's only waits for the first.
        """
        if "cpus =" not in text:
            text = f"cpus = {min(2, os.cpu_count() or 1)}\n{text}"
        write(CONFIG / f"{name}.toml", text)
        self.reload()

    def reload(self) -> None:
        """Return when the configuration is taken over."""
        self.run("busctl --timeout=300 call org.vmsilo1 /org/vmsilo1 org.vmsilo1.Manager Reload")

    def remove(self, name: str) -> None:
        self.run(f"vm-stop --force {name}", check=False)
        (CONFIG / f"{name}.toml").unlink(missing_ok=True)
        self.reload()

    def vm_run(self, name: str, *argv: str, **options: Any) -> Result:
        options.setdefault("user", "user")
        return self.run(f"vm-run {name} {shlex.join(argv)}", **options)

    def main_pid(self, name: str) -> int:
        return int(self.read(f"systemctl show -P MainPID vmsilo-{name}-vm.service"))

    def vms(self) -> dict[str, dict[str, Any]]:
        return {row["Name"]: row for row in json.loads(self.read("vmsilo list --json"))}

    def journal(self, name: str) -> str:
        return self.read(f"journalctl -b -q --no-pager -o cat -u vmsilo-{name}-vm.service")

    def wait_until(self, condition: str, *, seconds: float = 60) -> None:
        """Wait for a shell condition."""
        deadline = time.monotonic() + seconds
        while self.run(condition, check=False).returncode:
            if time.monotonic() > deadline:
                raise AssertionError(f"still not true after {seconds:g} s: {condition}")
            time.sleep(0.2)

    @contextlib.contextmanager
    def vm(self, name: str, text: str) -> Iterator[str]:
        """A VM that is configured for the block."""
        self.define(name, text)
        try:
            yield name
        finally:
            self.remove(name)


def write(path: Path, text: str) -> None:
    """Whole at once: vmsilod may read it at any moment."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    fresh.rename(path)


def require_program(name: str) -> str:
    """Skip, naming what is missing."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not in PATH")
    return path


@pytest.fixture(scope="session", autouse=True)
def _standing_still() -> Iterator[None]:
    if not standstill.is_emulated():
        yield
        return
    watch = standstill.Watch()
    watch.start()
    yield
    watch.stop()


@pytest.fixture(scope="session")
def host() -> Host:
    return Host()
