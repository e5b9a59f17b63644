"""Daemons that are killed, restarted or frozen at any moment: VMs and commands go on, and all converges."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from hosts.standin.site import unit

if TYPE_CHECKING:
    from hosts.standin.site import Site

COUNT = ("sh", "-c", "i=0; while [ $i -lt 30 ]; do i=$((i+1)); echo $i; sleep 0.1; done")
COUNTED = "".join(f"{number}\n" for number in range(1, 31)).encode()
DAEMONS = ("vmsilod.service", "vmsilo-relayd.service")


def kill(site: Site, daemon: str, signal: str = "KILL") -> None:
    """The main process alone; nothing happens if there is none just now."""
    if signal == "KILL":
        site.host.kill_main(daemon)
        return
    site.host.run(["systemctl", "kill", "--kill-whom=main", f"--signal={signal}", daemon], check=False)


def wait_for_daemon(site: Site, daemon: str) -> None:
    site.host.wait_until(f"systemctl -q is-active {daemon}", seconds=20)


@pytest.mark.parametrize("milliseconds", [0, 30, 60, 90, 120, 140, 160, 180, 200, 220, 300, 400])
def test_vmsilod_is_killed_during_a_start(site: Site, milliseconds: int) -> None:
    """A launcher asks again, so that the start succeeds all the same."""
    name = site.define()
    client = site.spawn("vm-run", name, "echo", "survived", stdout=-1, stderr=-1)
    time.sleep(milliseconds / 1000)
    kill(site, "vmsilod.service")
    out, err = client.communicate(timeout=60)
    assert (client.returncode, out) == (0, b"survived\n"), err
    wait_for_daemon(site, "vmsilod.service")
    assert site.wait_for_state(name, "running")["Pid"] == site.main_pid(name)


def test_vmsilod_is_killed_again_and_again_during_a_start(site: Site) -> None:
    name = site.define()
    client = site.spawn("vm-run", name, "true", stderr=-1)
    for _ in range(10):
        kill(site, "vmsilod.service")
        time.sleep(0.15)
    client.communicate(timeout=60)
    assert client.returncode in (0, 125)
    wait_for_daemon(site, "vmsilod.service")
    site.wait_for_state(name, "running", "stopped", "failed")
    assert site.vm_run(name, "echo", "now").stdout == "now\n"
    site.expect(r"vmsilod (died|does not answer)|Failed to start")


@pytest.mark.parametrize("milliseconds", [0, 30, 60, 100, 180])
def test_vmsilod_is_killed_during_a_stop(site: Site, milliseconds: int) -> None:
    name = site.running()
    stop = site.spawn("systemctl", "stop", unit(name), user="root")
    time.sleep(milliseconds / 1000)
    kill(site, "vmsilod.service")
    assert stop.wait(60) == 0
    wait_for_daemon(site, "vmsilod.service")
    site.wait_for_state(name, "stopped")
    assert "SIGKILL" not in site.journal_of(name)


@pytest.mark.parametrize("milliseconds", [0, 60, 120, 200])
def test_the_relay_is_killed_during_a_start(site: Site, milliseconds: int) -> None:
    """A client that the relay had in hand is told so at most; the VM itself runs."""
    name = site.define()
    client = site.spawn("vm-run", name, "true", stderr=-1)
    time.sleep(milliseconds / 1000)
    kill(site, "vmsilo-relayd.service")
    _, err = client.communicate(timeout=60)
    assert client.returncode in (0, 125), err
    assert len(err.splitlines()) <= 2, err
    wait_for_daemon(site, "vmsilo-relayd.service")
    assert site.vm_run(name, "echo", "now").stdout == "now\n"
    site.wait_for_state(name, "running")
    site.expect("vmsilo-relayd|went away|Failed to start")


@pytest.mark.parametrize("daemon", DAEMONS)
@pytest.mark.parametrize("how", ["kill", "restart", "stop"])
def test_a_running_command_outlives_a_daemon(site: Site, daemon: str, how: str) -> None:
    name = site.running()
    pid = site.main_pid(name)
    client = site.spawn("vm-run", name, *COUNT, stdout=-1)
    time.sleep(0.5)
    if how == "kill":
        kill(site, daemon)
    else:
        site.host.run(["systemctl", how, daemon])
    if how == "stop":
        assert site.main_pid(name) == pid
        site.host.run(["systemctl", "start", daemon])
    wait_for_daemon(site, daemon)
    assert site.vm_run(name, "echo", "new").stdout == "new\n"
    assert client.communicate(timeout=30)[0] == COUNTED
    assert client.returncode == 0
    assert site.wait_for_state(name, "running")["Pid"] == pid
    site.host.run(["vm-stop", name], user="user")
    assert "the guest powered off" in site.journal_of(name)  # the agent was reached, by what was remembered


def test_daemons_crash_in_a_row_and_do_not_give_up(site: Site) -> None:
    site.expect("Failed to start")
    name = site.running()
    for daemon in DAEMONS:
        for _ in range(8):
            kill(site, daemon)
            time.sleep(0.35)
        wait_for_daemon(site, daemon)
    assert site.vm_run(name, "echo", "still").stdout == "still\n"
    assert site.wait_for_state(name, "running")["Pid"] == site.main_pid(name)


def test_the_relay_remembers_vms_while_vmsilod_is_gone(site: Site) -> None:
    name = site.running()
    site.host.run("systemctl stop vmsilod.service")
    kill(site, "vmsilo-relayd.service")
    wait_for_daemon(site, "vmsilo-relayd.service")
    assert site.vm_run(name, "echo", "alone").stdout == "alone\n"
    assert site.host.run("systemctl -q is-active vmsilod.service", check=False).returncode != 0
    site.host.run("systemctl start vmsilod.service")


def test_a_vm_that_ended_while_vmsilod_was_gone(site: Site) -> None:
    site.expect(r"QEMU was killed \(SIGKILL\)")
    name = site.running()
    site.host.run(
        "systemctl kill -s KILL --kill-whom=main vmsilod.service && systemctl stop vmsilod.service"
    )
    site.host.run(["kill", "-9", str(site.main_pid(name))])
    site.host.wait_until(f"! systemctl -q is-active {unit(name)}")
    site.host.run("systemctl start vmsilod.service")
    assert site.wait_for_state(name, "failed", "stopped")
    assert not site.host.run(["ls", "/run/vmsilo/vm"]).stdout
    assert site.vm_run(name, "echo", "again").stdout == "again\n"


def test_the_end_of_a_vm_is_seen_by_a_later_vmsilod(site: Site) -> None:
    site.expect(r"QEMU was killed \(SIGKILL\)")
    name = site.running()
    site.host.run("systemctl restart vmsilod.service")
    site.host.run(["kill", "-9", str(site.main_pid(name))])
    assert site.wait_for_state(name, "failed")["LastResult"] == "QEMU was killed (SIGKILL)"
    assert not site.host.run(["ls", "/run/vmsilo/vm"]).stdout


def test_a_frozen_vmsilod_is_not_missed_by_commands(site: Site) -> None:
    name = site.running()
    kill(site, "vmsilod.service", "STOP")
    try:
        for number in range(20):
            done = site.vm_run(name, "echo", str(number), timeout=5)
            assert done.stdout == f"{number}\n"
    finally:
        kill(site, "vmsilod.service", "CONT")


def test_a_frozen_relay_is_not_missed_by_a_running_command(site: Site) -> None:
    name = site.running()
    client = site.spawn("vm-run", name, "sh", "-c", "read x; echo $x", stdin=-1, stdout=-1)
    time.sleep(0.3)
    kill(site, "vmsilo-relayd.service", "STOP")
    try:
        assert client.communicate(b"through\n", timeout=10)[0] == b"through\n"
    finally:
        kill(site, "vmsilo-relayd.service", "CONT")
    assert client.returncode == 0


def test_a_frozen_daemon_is_found_by_its_watchdog(site: Site) -> None:
    for daemon in DAEMONS:
        shown = site.host.run(["systemctl", "show", "-P", "WatchdogUSec", "-P", "Restart", daemon]).stdout
        assert sorted(shown.split()) == ["30s", "always"]
