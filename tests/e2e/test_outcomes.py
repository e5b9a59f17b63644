"""How the runs of a real guest end, under `restart = "on-crash"`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hosts.container import Container

NAME = "other"
UNIT = f"vmsilo-{NAME}-vm.service"


@pytest.fixture
def other(host: Container) -> Container:
    host.write(f"/etc/vmsilo/vms.d/{NAME}.toml", 'memory = 768\nrestart = "on-crash"\n')
    host.run(["vmsilo", "check"])
    host.run(["vm-stop", "demo"], user="user", check=False)
    host.run(["vm-start", NAME, "--wait"], user="user")
    return host


def as_root(host: Container, *command: str) -> None:
    host.run(["vm-run", "--root", NAME, *command], user="user", check=False)


def boot_id(host: Container) -> str:
    command = ["vm-run", NAME, "cat", "/proc/sys/kernel/random/boot_id"]
    return host.run(command, user="user", check=False).stdout


def shown(host: Container, name: str) -> str:
    return host.run(["systemctl", "show", "-P", name, UNIT]).stdout.strip()


def wait_for(host: Container, **wanted: Any) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while any((vm := host.vms()[NAME])[key] != value for key, value in wanted.items()):
        assert time.monotonic() < deadline, vm
        time.sleep(0.2)
    return vm


def test_a_panicked_guest_is_started_again(other: Container) -> None:
    pid = shown(other, "MainPID")
    as_root(other, "sh", "-c", "echo c > /proc/sysrq-trigger")
    vm = wait_for(other, LastOutcome="panic")
    assert "kernel panicked" in vm["LastResult"]
    wait_for(other, State="running")
    assert shown(other, "MainPID") not in (pid, "0")
    assert other.run(["vm-run", NAME, "echo", "back"], user="user").stdout == "back\n"


def test_a_rebooted_guest_stays_in_its_unit(other: Container) -> None:
    pid, run, boot = shown(other, "MainPID"), shown(other, "InvocationID"), boot_id(other)
    before = other.vms()[NAME]["LastOutcome"]
    as_root(other, "systemctl", "reboot", "--no-block")
    deadline = time.monotonic() + 120
    while boot_id(other) in ("", boot):
        assert time.monotonic() < deadline
    assert (shown(other, "MainPID"), shown(other, "InvocationID")) == (pid, run)
    assert other.vms()[NAME]["LastOutcome"] == before


def test_a_guest_that_powers_off_stays_off(other: Container) -> None:
    as_root(other, "systemctl", "poweroff", "--no-block")
    wait_for(other, LastOutcome="powered-off", State="stopped")
    assert (shown(other, "ActiveState"), shown(other, "Result")) == ("inactive", "success")
    time.sleep(2)
    assert other.vms()[NAME]["State"] == "stopped"
    other.run(["vm-start", "demo"], user="user")
