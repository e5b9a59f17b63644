"""Three VMs at once, and the host's shutdown while they run: ordered, with a deadline."""

from __future__ import annotations

import json
import subprocess

import pytest

from .conftest import CONFIG, Host, write

NAMES = ("lab-one", "lab-two", "lab-three")
STUCK = "lab-three"
STUCK_DEADLINE = 10


def define_three(host: Host) -> None:
    for name in NAMES:
        deadline = STUCK_DEADLINE if name == STUCK else 60
        text = f"memory = 512\ncpus = 1\nstart_timeout = 900\nstop_timeout = {deadline}\n"
        write(CONFIG / f"{name}.toml", text)
    host.reload()


@pytest.mark.leaving
def test_three_vms_at_once(host: Host) -> None:
    define_three(host)
    starts = [
        subprocess.Popen(
            [
                "setpriv",
                "--reuid=user",
                "--regid=user",
                "--init-groups",
                "vm-run",
                name,
                "cat",
                "/proc/sys/kernel/hostname",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        for name in NAMES
    ]
    said = [start.communicate(timeout=960) for start in starts]
    assert [output.strip() for output, _ in said] == list(NAMES), said
    uids = {host.read(f"stat -c %u /proc/{host.main_pid(name)}") for name in NAMES}
    assert len(uids) == 3
    # One VM's uid sees nothing of another: not its run-time directory, not its memory.
    one, two = (host.main_pid(name) for name in NAMES[:2])
    uid = host.read(f"stat -c %u /proc/{one}")
    as_one = f"setpriv --reuid={uid} --regid={uid} --clear-groups"
    assert host.run(f"{as_one} cat /proc/{two}/environ", check=False).returncode
    assert host.run(f"{as_one} ls /run/vmsilo/vm/lab-two", check=False).returncode


@pytest.mark.leaving
def test_one_guest_will_not_go(host: Host) -> None:
    """A service of its own holds its shutdown up for longer than the VM's stop_timeout."""
    hold = "systemd-run -p ExecStop='/bin/sleep 900' -p TimeoutStopSec=900 sleep infinity"
    host.run(f"vm-run --root {STUCK} {hold}")


def find_message(host: Host, unit: str, text: str) -> float:
    """When PID 1 said so about a unit in the boot before this one, in seconds."""
    lines = host.read(f"journalctl -b -1 -q -o json UNIT={unit}").splitlines()
    found = [entry for entry in map(json.loads, lines) if str(entry.get("MESSAGE", "")).startswith(text)]
    assert found, f"{unit} never said {text}"
    return int(found[-1]["__REALTIME_TIMESTAMP"]) / 1e6


@pytest.mark.second
def test_shutdown_stopped_vms_first_and_in_time(host: Host) -> None:
    stopping = find_message(host, "vmsilod.service", "Stopping")
    begin = min(find_message(host, f"vmsilo-{name}-vm.service", "Stopping") for name in NAMES)
    for name in NAMES:
        unit = f"vmsilo-{name}-vm.service"
        ended = find_message(host, unit, "Stopped")
        assert ended <= stopping, f"{name} ended after vmsilod was told to stop"
        limit = STUCK_DEADLINE + 15 if name == STUCK else 75
        assert ended - begin < limit


@pytest.mark.second
def test_guests_were_asked_and_the_stuck_one_was_killed(host: Host) -> None:
    for name in NAMES:
        journal = host.read(f"journalctl -b -1 -q -o cat -u vmsilo-{name}-vm.service")
        assert ("the guest did not shut down" in journal) == (name == STUCK), journal


@pytest.mark.second
def test_nothing_of_the_last_boot_is_left(host: Host) -> None:
    vms = host.vms()
    assert {vms[name]["State"] for name in NAMES} == {"stopped"}
    assert host.read("find /run/vmsilo/vm -mindepth 1") == ""
    for name in NAMES:
        host.remove(name)
