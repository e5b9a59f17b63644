"""How the runs of real VMMs under KVM end: systemd's result, vmsilo's word for it, and what follows."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from lab.conftest import require_program

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.conftest import Host

PROGRAMS = {"crosvm": "crosvm", "qemu": "qemu-system-x86_64"}
# VMM -> status of the main process after a panic.
PANIC = {"crosvm": "status=34/", "qemu": "status=1/"}


class Guest:
    """One VM that is started again after a crash."""

    def __init__(self, host: Host, name: str, vmm: str) -> None:
        self.host, self.name, self.vmm = host, name, vmm
        self.unit = f"vmsilo-{name}-vm.service"

    def start(self) -> int:
        self.host.run(f"vm-start --wait {self.name}", user="user")
        return self.host.main_pid(self.name)

    def as_root(self, command: str) -> None:
        self.host.run(f"vm-run --root {self.name} sh -c '{command}'", user="user", check=False)

    def shown(self, *names: str) -> tuple[str, ...]:
        return tuple(self.host.read(f"systemctl show -P {name} {self.unit}") for name in names)

    def wait_for(self, seconds: float = 600, **wanted: Any) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while any((vm := self.host.vms()[self.name])[key] != value for key, value in wanted.items()):
            assert time.monotonic() < deadline, (vm, self.host.journal(self.name)[-3000:])
            time.sleep(2)  # each look costs the lab a second
        return vm

    def wait_for_end(self, outcome: str, *marks: str) -> None:
        """The unit is failed for a second only; its journal keeps what systemd said."""
        self.wait_for(LastOutcome=outcome)
        journal = self.host.journal(self.name)
        for mark in marks:
            assert mark in journal

    def boot_id(self) -> str:
        command = f"vm-run {self.name} cat /proc/sys/kernel/random/boot_id"
        return self.host.run(command, user="user", check=False).stdout


@pytest.fixture(scope="module", params=sorted(PROGRAMS))
def guest(request: pytest.FixtureRequest, host: Host) -> Iterator[Guest]:
    vmm = request.param
    require_program(PROGRAMS[vmm])
    # Some hosts of the lab emulate it, and are busy besides.
    text = f'memory = 512\nstart_timeout = 900\nvmm = "{vmm}"\n'
    text += 'restart = { policy = "on-crash", limit = 10 }\n'
    with host.vm(f"end-{vmm}", text) as name:
        yield Guest(host, name, vmm)


def test_panic(guest: Guest) -> None:
    pid = guest.start()
    guest.as_root("echo c > /proc/sysrq-trigger")
    guest.wait_for_end("panic", PANIC[guest.vmm], "Failed with result 'exit-code'")
    guest.wait_for(State="running")
    assert guest.host.main_pid(guest.name) != pid
    assert "kernel panicked" in guest.host.vms()[guest.name]["LastResult"]


def test_reset(guest: Guest) -> None:
    pid, boot = guest.start(), guest.boot_id()
    outcome = guest.host.vms()[guest.name]["LastOutcome"]
    guest.as_root("systemctl reboot --no-block")
    deadline = time.monotonic() + 600
    while guest.boot_id() in ("", boot):
        assert time.monotonic() < deadline, guest.host.journal(guest.name)[-3000:]
        time.sleep(2)
    in_place = guest.vmm == "qemu"
    assert (guest.host.main_pid(guest.name) == pid) == in_place
    now = guest.host.vms()[guest.name]
    assert (now["State"], now["LastOutcome"]) == ("running", outcome if in_place else "reset")
    assert guest.shown("NRestarts") == ("0" if in_place else "1",)


def test_power_off(guest: Guest) -> None:
    guest.start()
    guest.as_root("systemctl poweroff --no-block")
    guest.wait_for(State="stopped", LastOutcome="powered-off", LastResult="")
    assert guest.shown("ActiveState", "Result", "ExecMainStatus") == ("inactive", "success", "0")
    time.sleep(2)
    assert guest.host.main_pid(guest.name) == 0


def test_a_crash_and_a_kill(guest: Guest) -> None:
    """Of guests that boot, which costs no other boot: the second is the first, started again."""
    guest.host.run(f"vm-start {guest.name}", user="user")
    pid = guest.host.main_pid(guest.name)
    # Not SEGV: crosvm's first one, if nothing faulted, only takes Rust's handler away.
    guest.host.run(f"kill -ABRT {pid}")
    guest.wait_for_end("crash", "/ABRT", "starts again")
    guest.wait_for(State="starting")
    assert guest.host.main_pid(guest.name) not in (0, pid)
    guest.host.run(f"vm-stop --force {guest.name}", user="user")
    guest.wait_for(State="stopped", LastOutcome="killed-on-request")
    assert guest.shown("ActiveState") == ("inactive",)


def test_out_of_memory(guest: Guest) -> None:
    """The unit's limit is below what the guest may use, and needs while it boots: that is the VMM's."""
    guest.host.run(f"systemctl set-property --runtime {guest.unit} MemoryMax=128M MemorySwapMax=0")
    try:
        guest.host.run(f"vm-start {guest.name}", user="user", check=False)
        guest.wait_for_end("out-of-memory", "Failed with result 'oom-kill'")
        assert "memory ran out" in guest.host.vms()[guest.name]["LastResult"]
    finally:
        guest.host.run(f"vm-stop --force {guest.name}", user="user", check=False)
        guest.host.run(f"systemctl set-property --runtime {guest.unit} MemoryMax=infinity")


def test_a_device_process_of_crosvm_dies(guest: Guest) -> None:
    if guest.vmm != "crosvm":
        pytest.skip("QEMU is one process")
    pid = guest.start()
    children = guest.host.read(f"pgrep -P {pid}").split()
    assert children
    guest.host.run(f"kill -KILL {children[-1]}")
    guest.wait_for_end("crash", "status=33/")
