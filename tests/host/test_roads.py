"""Every road to a start and every road to a stop: all end in the same unit, and nothing is left."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest
from hosts.layers import USER
from hosts.standin.site import unit

if TYPE_CHECKING:
    from hosts.standin.site import Site

VMM = "/usr/local/bin/qemu-system-x86_64"


def assert_runs(site: Site, name: str) -> None:
    vm = site.wait_for_state(name, "running")
    assert vm["Unit"] == unit(name)
    assert vm["Pid"] == site.main_pid(name) != 0
    assert site.vm_run(name, "echo", "warm").stdout == "warm\n"


def assert_stopped(site: Site, name: str, result: str = "") -> None:
    assert site.wait_for_state(name, "stopped", "failed")["State"] == "stopped"
    assert site.show(name)["LastResult"] == result
    assert site.main_pid(name) == 0
    assert not site.host.run(f"systemctl -q is-active vmsilo-{name}.socket", check=False).returncode


def test_started_by_a_command(site: Site) -> None:
    name = site.define()
    assert site.state(name) == "stopped"
    done = site.vm_run(name, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert_runs(site, name)


def test_started_by_vm_start(site: Site) -> None:
    name = site.define()
    site.host.run(["vm-start", "--wait", name], user=USER)
    assert site.state(name) == "running"
    assert_runs(site, name)


def test_started_over_the_bus(site: Site) -> None:
    name = site.define()
    site.host.run(
        [
            "busctl",
            "call",
            "org.vmsilo1",
            f"/org/vmsilo1/vm/{name}",
            "org.vmsilo1.VM",
            "Start",
            "a{sv}",
            "0",
        ],
        user=USER,
    )
    assert_runs(site, name)


def test_started_by_systemctl(site: Site) -> None:
    name = site.define()
    site.host.run(["systemctl", "start", unit(name)])
    assert_runs(site, name)


def test_started_as_a_dependency(site: Site) -> None:
    needed = site.define()
    name = site.define(f'depends_on = ["{needed}"]')
    assert site.vm_run(name, "true").returncode == 0
    assert_runs(site, needed)


def test_many_commands_on_a_stopped_vm_start_it_once(site: Site) -> None:
    name = site.define()
    clients = [site.spawn("vm-run", name, "true") for _ in range(20)]
    assert [client.wait(60) for client in clients] == [0] * 20
    assert site.journal_of(name).count("standin fds: ") == 1


def test_stopped_by_vm_stop(site: Site) -> None:
    name = site.running()
    site.host.run(["vm-stop", name], user=USER)
    assert_stopped(site, name)
    assert "the guest powered off" in site.journal_of(name)


def test_stopped_by_systemctl(site: Site) -> None:
    name = site.running()
    site.host.run(["systemctl", "stop", unit(name)])
    assert_stopped(site, name)
    assert "the guest powered off" in site.journal_of(name)


def test_stop_of_a_guest_without_agent_is_the_power_button(site: Site) -> None:
    name = site.define(mode="no-agent")
    site.host.run(["systemctl", "start", unit(name)])
    site.host.wait_until(f"test -e /run/vmsilo-relay/{name}.json")
    site.host.run(["vm-stop", name], user=USER)
    assert_stopped(site, name)
    assert "the guest took the power button" in site.journal_of(name)


def test_stop_of_a_guest_whose_agent_died_is_the_power_button(site: Site) -> None:
    name = site.define(mode="dying-agent")
    site.host.run(["vm-start", "--wait", name], user=USER)
    time.sleep(1.2)
    begin = time.monotonic()
    site.host.run(["vm-stop", name], user=USER)
    assert time.monotonic() - begin < 6
    assert_stopped(site, name)
    assert "the guest took the power button" in site.journal_of(name)


def test_a_guest_that_ignores_the_request_is_ended_at_its_deadline(site: Site) -> None:
    name = site.running("deaf", "stop_timeout = 2")
    begin = time.monotonic()
    site.host.run(["vm-stop", name], user=USER)
    assert 2 <= time.monotonic() - begin < 9
    assert_stopped(site, name)
    assert "did not shut down in 2 s" in site.journal_of(name)


def test_a_timeout_of_vm_stop_shortens_the_deadline(site: Site) -> None:
    name = site.running("deaf", "stop_timeout = 60")
    begin = time.monotonic()
    site.host.run(["vm-stop", "--timeout", "1", name], user=USER)
    assert 1 <= time.monotonic() - begin < 9
    assert_stopped(site, name)


@pytest.mark.parametrize("mode", ["", "stubborn"])
def test_stop_by_force(site: Site, mode: str) -> None:
    name = site.running(mode)
    begin = time.monotonic()
    site.host.run(["vm-stop", "--force", name], user=USER)
    assert time.monotonic() - begin < 8
    assert_stopped(site, name, "killed on request")
    assert "the guest powered off" not in site.journal_of(name)


def test_the_guest_powers_off_by_itself(site: Site) -> None:
    name = site.running()
    site.vm_run(name, "sh", "-c", "kill -USR1 $(cat /tmp/guest/vmm)")
    assert_stopped(site, name)
    assert site.vm_run(name, "echo", "again").stdout == "again\n"


def test_the_vmm_is_killed(site: Site) -> None:
    site.expect(r"QEMU was killed \(SIGKILL\)")
    name = site.running()
    site.host.run(["kill", "-9", str(site.main_pid(name))])
    vm = site.wait_for_state(name, "failed")
    assert vm["LastResult"] == "QEMU was killed (SIGKILL)"
    assert site.vm_run(name, "echo", "again").stdout == "again\n"


def test_the_guest_panics(site: Site) -> None:
    site.expect("its kernel panicked")
    name = site.running("late-panic")
    vm = site.wait_for_state(name, "failed")
    assert "its kernel panicked" in vm["LastResult"]


def test_a_vmm_that_fails_to_start(site: Site) -> None:
    site.expect("QEMU could not start the VM")
    name = site.define(mode="exit-1")
    begin = time.monotonic()
    done = site.vm_run(name, "true")
    assert time.monotonic() - begin < 10
    assert done.returncode == 125
    assert "could not start the VM" in done.stderr
    assert len(done.stderr.splitlines()) <= 2, done.stderr
    assert site.vm_run(name, "true").returncode == 125  # the socket still listens


def test_a_vmm_that_crashes(site: Site) -> None:
    site.expect(r"QEMU crashed \(SIGABRT\)")
    name = site.define(mode="crash")
    assert site.vm_run(name, "true").returncode == 125
    assert "crashed (SIGABRT)" in site.show(name)["LastResult"]
    assert site.state(name) == "failed"


def test_a_guest_that_never_gets_ready(site: Site) -> None:
    name = site.define("start_timeout = 2", mode="never-ready")
    done = site.host.run(["vm-start", "--wait", name], user=USER, check=False)
    assert done.returncode == 1
    assert "not ready within 2 s" in done.stderr
    done = site.vm_run("--timeout", "1", name, "true")
    assert done.returncode == 125
    assert "did not get ready in time" in done.stderr


def test_a_slow_boot_shows_what_is_waited_for(site: Site) -> None:
    name = site.define('kernel_params = ["standin.delay=1"]')
    client = site.spawn("vm-run", name, "true")
    vm = site.wait_for_state(name, "starting")
    while not vm["Status"]:
        vm = site.show(name)
    assert vm["Status"] == "reached basic.target"
    assert client.wait(30) == 0
    site.host.wait_until(f"systemctl status {unit(name)} | grep -q 'Status: .guest ready'")
    site.host.wait_until(f"vmsilo status {name} | grep -q 'Status *stand-in guest {name} is up'", seconds=5)


def test_stop_while_the_guest_boots(site: Site) -> None:
    name = site.define('kernel_params = ["standin.delay=30"]')
    client = site.spawn("vm-run", name, "true", stderr=-1)
    site.wait_for_state(name, "starting")
    site.host.wait_until(f"test -e /run/vmsilo-relay/{name}.json")
    site.host.run(["vm-stop", name], user=USER)
    assert client.communicate(timeout=30)[1] == f"vm-run: VM '{name}': {name} is being stopped\n".encode()
    assert client.returncode == 125
    assert_stopped(site, name)  # and not started again by the client that waited


def test_restart_takes_the_configuration_of_now(site: Site) -> None:
    name = site.running()
    before = json.loads(site.journal_of(name).partition("standin fds: ")[2].partition("\n")[0])
    assert before
    pid = site.main_pid(name)
    site.host.run(
        [
            "busctl",
            "call",
            "org.vmsilo1",
            f"/org/vmsilo1/vm/{name}",
            "org.vmsilo1.VM",
            "Restart",
            "a{sv}",
            "0",
        ],
        user=USER,
    )
    assert_runs(site, name)
    assert site.main_pid(name) != pid
