"""Every way a run can end: what systemd, vmsilo and the journal say of it, and whether the VM comes back."""

from __future__ import annotations

import json
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
from hosts.layers import USER
from hosts.standin.site import unit

if TYPE_CHECKING:
    from hosts.standin.site import Site

ON_CRASH = 'restart = "on-crash"\n'
CRASHED = r"crashed|kernel panicked|was killed|memory ran out|could not start|unknown exit code|oom"


def ended(site: Site, name: str) -> tuple[str, str, str]:
    """systemd's ActiveState and Result, vmsilo's LastOutcome."""
    vm = site.wait_for_state(name, "stopped", "failed")
    shown = site.unit(name, "ActiveState", "Result")
    return shown["ActiveState"], shown["Result"], vm["LastOutcome"]


def line_of(site: Site, name: str) -> dict[str, Any]:
    """vmsilod's last word on the end of a run, as the unit's own journal shows it."""
    out = site.host.run(
        ["journalctl", "-q", "-o", "json", "-u", unit(name), f"VMSILO_VM={name}"], check=False
    ).stdout
    # With -u the matches are alternatives, so those of other origin are in it.
    lines = [json.loads(line) for line in out.splitlines()]
    found: dict[str, Any] = next(line for line in reversed(lines) if "VMSILO_OUTCOME" in line)
    return found


def signal_vmm(site: Site, name: str, signal: str) -> int:
    pid = site.main_pid(name)
    site.host.run(["kill", f"-{signal}", str(pid)])
    return pid


def wait_for_new_pid(site: Site, name: str, old: int, seconds: float = 20) -> int:
    deadline = time.monotonic() + seconds
    while (pid := site.main_pid(name)) in (0, old):
        assert time.monotonic() < deadline, site.show(name)
        time.sleep(0.1)
    site.wait_for_state(name, "running")
    return pid


def test_power_off(site: Site) -> None:
    name = site.running(text=ON_CRASH)
    signal_vmm(site, name, "USR1")
    assert ended(site, name) == ("inactive", "success", "powered-off")
    assert site.show(name)["LastResult"] == ""
    line = line_of(site, name)
    assert (line["MESSAGE"], line["PRIORITY"]) == (f"VM {name}: the guest powered off", "6")
    time.sleep(1.5)
    assert site.state(name) == "stopped"


def test_stop(site: Site) -> None:
    name = site.running(text=ON_CRASH)
    site.host.run(["vm-stop", name], user=USER)
    assert ended(site, name) == ("inactive", "success", "stopped")
    assert line_of(site, name)["PRIORITY"] == "6"


def test_killed_on_request(site: Site) -> None:
    name = site.running(text=ON_CRASH)
    site.host.run(["vm-stop", "--force", name], user=USER)
    assert ended(site, name) == ("inactive", "success", "killed-on-request")
    assert site.show(name)["LastResult"] == "killed on request"
    assert line_of(site, name)["PRIORITY"] == "6"
    time.sleep(1.5)
    assert site.state(name) == "stopped"


@pytest.mark.parametrize("milliseconds", [0, 30, 60, 100, 150, 250])
def test_killed_on_request_during_the_start(site: Site, milliseconds: int) -> None:
    """Nothing starts it again, not even what the start had under way; and it did not fail."""
    name = site.define(ON_CRASH)
    site.host.run(["systemctl", "start", "--no-block", unit(name)])
    site.host.wait_until(f"systemctl show -P ActiveState {unit(name)} | grep -qE '^activ'")
    time.sleep(milliseconds / 1000)
    site.host.run(["vm-stop", "--force", name], user=USER)
    state, result, outcome = ended(site, name)
    # "": its launcher had not asked vmsilod for anything.
    assert (state, result) == ("inactive", "success")
    assert outcome in {"killed-on-request", ""}
    time.sleep(1)
    assert site.main_pid(name) == 0


@pytest.mark.parametrize("milliseconds", [0, 50, 150])
def test_who_waits_for_a_start_does_not_begin_it_again_when_it_was_killed(
    site: Site, milliseconds: int
) -> None:
    name = site.define('kernel_params = ["standin.delay=20"]')
    client = site.spawn("vm-run", name, "true", stderr=subprocess.PIPE)
    site.host.wait_until(f"test -e /run/vmsilo/state/{name}.json")
    time.sleep(milliseconds / 1000)
    site.host.run(["vm-stop", "--force", name], user=USER)
    _, error = client.communicate(timeout=30)
    assert client.returncode == 125, error
    assert b"stop" in error or b"killed on request" in error
    time.sleep(1)
    assert site.main_pid(name) == 0


def test_panic(site: Site) -> None:
    site.expect(CRASHED)
    name = site.running()
    signal_vmm(site, name, "USR2")
    assert ended(site, name) == ("failed", "exit-code", "panic")
    line = line_of(site, name)
    assert "kernel panicked" in line["MESSAGE"]
    assert line["PRIORITY"] == "3"
    assert "kernel panicked" in site.host.run(["vmsilo", "list"]).stdout
    shown = site.host.run(["vmsilo", "status", name], check=False).stdout
    assert ["LastOutcome", "panic"] in [line.split() for line in shown.splitlines()]
    time.sleep(1.5)
    assert site.state(name) == "failed"  # nobody asked for a restart


def test_a_panic_before_the_guest_said_a_word(site: Site) -> None:
    site.expect(CRASHED)
    name = site.define('kernel_params = ["standin.mode=early-panic", "standin.delay=5"]')
    site.host.run(["vm-start", name], user=USER)
    assert ended(site, name) == ("failed", "exit-code", "panic")


def test_a_vmm_that_cannot_start(site: Site) -> None:
    site.expect(CRASHED)
    name = site.define(ON_CRASH, mode="exit-1")
    site.vm_run(name, "true")
    assert ended(site, name) == ("failed", "exit-code", "failed")
    time.sleep(1.5)
    assert site.state(name) == "failed"


def test_a_start_that_vmsilod_refuses(site: Site) -> None:
    site.expect("Failed to start|cannot open|no image|no-such-image")
    name = site.define(ON_CRASH + 'image = "no-such-image"\n')
    done = site.vm_run(name, "true")
    assert done.returncode == 125
    active, _, outcome = ended(site, name)
    assert (active, outcome) == ("failed", "start-failed")
    assert "no-such-image" in site.show(name)["LastResult"]


def test_a_start_that_never_gets_to_vmsilod(site: Site) -> None:
    site.expect("Failed")
    name = site.define(ON_CRASH)
    folder = f"/run/systemd/system/{unit(name)}.d"
    site.host.write(f"{folder}/90-test.conf", "[Service]\nReadWritePaths=/nowhere/at/all\n")
    site.host.run("systemctl daemon-reload")
    try:
        assert site.vm_run(name, "true").returncode == 125
        active, _, outcome = ended(site, name)
        assert (active, outcome) == ("failed", "start-failed")
    finally:
        site.host.run(f"rm -r {folder}; systemctl daemon-reload")


def test_vmm_crash(site: Site) -> None:
    site.expect(CRASHED)
    name = site.running()
    signal_vmm(site, name, "SEGV")
    active, result, outcome = ended(site, name)
    assert (active, outcome) == ("failed", "crash")
    assert result in ("signal", "core-dump")
    assert site.show(name)["LastResult"] == "QEMU crashed (SIGSEGV)"


def test_out_of_memory(site: Site) -> None:
    if "memory" not in site.host.run("cat /sys/fs/cgroup/cgroup.controllers", check=False).stdout:
        pytest.skip("no memory controller (cgroup v2) in the container host")
    site.expect(CRASHED)
    name = site.define(mode="hog")
    site.host.run(["systemctl", "set-property", "--runtime", unit(name), "MemoryMax=100M"])
    site.host.run(["vm-start", name], user=USER)
    assert ended(site, name) == ("failed", "oom-kill", "out-of-memory")
    assert "memory ran out" in site.show(name)["LastResult"]
    site.host.run(["systemctl", "revert", unit(name)], check=False)


@pytest.mark.parametrize("signal", ["USR2", "SEGV", "KILL"])
def test_a_crashed_vm_is_started_again(site: Site, signal: str) -> None:
    site.expect(CRASHED)
    name = site.running(text=ON_CRASH)
    pid = signal_vmm(site, name, signal)
    wait_for_new_pid(site, name, pid)
    assert site.vm_run(name, "echo", "back").stdout == "back\n"
    assert site.show(name)["LastOutcome"] in ("panic", "crash", "killed")  # what happened is still told
    assert "starts again in 1 s (1 of 3)" in line_of(site, name)["MESSAGE"]


def test_the_limit(site: Site) -> None:
    site.expect(CRASHED)
    name = site.running(text='restart = { policy = "on-crash", limit = 2 }\n')
    pid = 0
    for _ in range(2):
        pid = signal_vmm(site, name, "SEGV")
        pid = wait_for_new_pid(site, name, pid)
    signal_vmm(site, name, "SEGV")
    vm = site.wait_for_state(name, "failed")
    assert vm["LastResult"].endswith("; not started again after 2 restarts within 600 s")
    time.sleep(4.5)
    assert site.state(name) == "failed"
    # A command starts it, and the count with it.
    site.vm_run(name, "true")
    pid = signal_vmm(site, name, "SEGV")
    wait_for_new_pid(site, name, pid)


def test_a_stop_cancels_a_planned_start(site: Site) -> None:
    site.expect(CRASHED)
    name = site.running(text=ON_CRASH)
    signal_vmm(site, name, "SEGV")
    vm = site.wait_for_state(name, "failed")
    assert vm["Status"] == "starts again in 1 s"
    site.host.run(["vm-stop", name], user=USER)
    assert site.show(name)["Status"] == ""
    time.sleep(2)
    assert site.main_pid(name) == 0


def test_a_command_does_not_wait_for_the_planned_start(site: Site) -> None:
    site.expect(CRASHED)
    name = site.running(text=ON_CRASH)
    signal_vmm(site, name, "SEGV")
    site.wait_for_state(name, "failed")
    assert site.vm_run(name, "echo", "now").stdout == "now\n"
    pid = site.main_pid(name)
    time.sleep(2)
    assert site.main_pid(name) == pid


def test_a_crash_during_a_stop_stays_down(site: Site) -> None:
    site.expect(CRASHED)
    name = site.running("deaf", ON_CRASH + "stop_timeout = 20\n")
    stop = site.spawn("systemctl", "stop", unit(name), user="root")
    site.wait_for_state(name, "stopping")
    time.sleep(0.3)
    signal_vmm(site, name, "SEGV")
    assert stop.wait(30) == 0
    assert ended(site, name)[2] == "crash"
    time.sleep(1.5)
    assert site.main_pid(name) == 0


@pytest.mark.parametrize("milliseconds", [0, 20, 50, 100, 300, 900])
def test_vmsilod_is_killed_between_crash_and_start(site: Site, milliseconds: int) -> None:
    site.expect(CRASHED)
    name = site.running(text=ON_CRASH)
    pid = signal_vmm(site, name, "SEGV")
    time.sleep(milliseconds / 1000)
    site.host.kill_main("vmsilod.service")
    wait_for_new_pid(site, name, pid)
    assert site.vm_run(name, "echo", "back").stdout == "back\n"


def test_a_crash_while_vmsilod_is_down(site: Site) -> None:
    site.expect(CRASHED)
    name = site.running(text=ON_CRASH)
    kill = "systemctl kill -s KILL --kill-whom=main vmsilod.service && systemctl stop vmsilod.service"
    site.host.run(kill)
    pid = signal_vmm(site, name, "SEGV")
    site.host.wait_until(f"! systemctl -q is-active {unit(name)}")
    site.host.run("systemctl start vmsilod.service")
    wait_for_new_pid(site, name, pid)
    assert site.show(name)["LastOutcome"] == "crash"


def test_the_last_result_outlives_vmsilod(site: Site) -> None:
    site.expect(CRASHED)
    name = site.running()
    signal_vmm(site, name, "SEGV")
    before = site.wait_for_state(name, "failed")["LastResult"]
    site.host.run("systemctl restart vmsilod.service")
    vm = site.wait_for_state(name, "failed")
    assert (vm["LastResult"], vm["LastOutcome"]) == (before, "crash")


def test_a_command_under_a_crash_says_why(site: Site) -> None:
    site.expect(CRASHED)
    name = site.running(text=ON_CRASH)
    client = site.spawn("vm-run", name, "sh", "-c", "echo up; sleep 987655", stdout=-1, stderr=-1)
    assert client.stdout is not None
    assert client.stdout.readline() == b"up\n"
    signal_vmm(site, name, "SEGV")
    _, err = client.communicate(timeout=20)
    assert client.returncode == 125
    assert err.startswith(b"vm-run: the connection to the guest was lost: QEMU crashed (SIGSEGV)\n")
