"""Changes of the configuration while everything runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hosts.layers import USER
from hosts.standin.site import VMS, unit

if TYPE_CHECKING:
    from hosts.standin.site import Site


def memory_of(site: Site, name: str) -> str:
    words = site.host.run(["cat", f"/proc/{site.main_pid(name)}/cmdline"]).stdout.split("\0")
    return words[words.index("-m") + 1]


def wait_for(site: Site, name: str, key: str, value: object) -> None:
    deadline = time.monotonic() + 10
    while site.host.vms().get(name, {}).get(key) != value:
        assert time.monotonic() < deadline, site.host.vms().get(name)
        time.sleep(0.1)


def test_a_vm_appears_and_disappears(site: Site) -> None:
    name = site.define("memory = 300")
    assert site.show(name)["Memory"] == 300
    for suffix in (f"{name}.socket", f"{name}-vm.service", f"{name}-debug.service"):
        assert site.host.run(["systemctl", "cat", f"vmsilo-{suffix}"]).returncode == 0
    tree = site.host.run(["busctl", "tree", "--list", "org.vmsilo1"]).stdout
    assert f"/org/vmsilo1/vm/{name}" in tree.splitlines()
    site.host.run(["rm", f"{VMS}/{name}.toml"])
    site.host.wait_until(f"! test -e /run/systemd/system/vmsilo-{name}.socket", seconds=10)
    site.host.wait_until(f"! test -e /run/vmsilo/{name}-command.socket", seconds=10)
    site.host.wait_until(f"! vmsilo list | grep -q '^{name} '", seconds=10)
    tree = site.host.run(["busctl", "tree", "--list", "org.vmsilo1"]).stdout
    assert f"/org/vmsilo1/vm/{name}" not in tree.splitlines()
    done = site.vm_run(name, "true")
    assert done.returncode == 125
    assert f"no VM '{name}'" in done.stderr


def test_a_broken_file_disables_that_vm_alone(site: Site) -> None:
    good, name = site.running(), site.define()
    site.host.write(f"{VMS}/{name}.toml", 'memory = 3\ncolour = "red"\n')
    wait_for(site, name, "State", "broken")
    shown = site.host.run(["vmsilo", "status", name], user=USER, check=False)
    assert shown.returncode == 3
    assert "memory: 3 is below 64 MiB" in shown.stdout
    assert "unknown key 'colour' (did you mean 'color'?)" in shown.stdout
    done = site.vm_run(name, "true")
    assert done.returncode == 125
    assert "broken configuration" in done.stderr
    assert site.host.run(["vm-start", name], user=USER, check=False).returncode == 1
    assert site.vm_run(good, "echo", "fine").stdout == "fine\n"
    site.host.write(f"{VMS}/{name}.toml", "memory = 300\n")
    site.wait_for_socket(name)
    assert site.vm_run(name, "echo", "mended").stdout == "mended\n"


def test_a_broken_file_of_a_running_vm_does_not_touch_it(site: Site) -> None:
    name = site.running()
    pid = site.main_pid(name)
    site.host.write(f"{VMS}/{name}.toml", "memory = \n")
    wait_for(site, name, "RestartNeeded", value=True)
    assert site.vm_run(name, "echo", "fine").stdout == "fine\n"
    assert site.main_pid(name) == pid
    site.host.run(["vm-stop", name], user=USER)
    assert "the guest powered off" in site.journal_of(name)
    wait_for(site, name, "State", "broken")


def test_a_running_vm_keeps_its_configuration_until_it_is_started_again(site: Site) -> None:
    name = site.running("", "memory = 300")
    assert memory_of(site, name) == "300M"
    site.host.write(f"{VMS}/{name}.toml", "memory = 400\n")
    wait_for(site, name, "RestartNeeded", value=True)
    assert "restart needed" in site.host.run(["vmsilo", "status", name], user=USER).stdout
    assert site.show(name)["Memory"] == 300
    site.host.run("systemctl restart vmsilod.service")
    assert site.show(name)["RestartNeeded"]
    assert memory_of(site, name) == "300M"
    site.host.run(["vm-stop", name], user=USER)
    assert site.vm_run(name, "true").returncode == 0
    assert memory_of(site, name) == "400M"
    assert not site.show(name)["RestartNeeded"]


def test_a_stop_uses_the_configuration_of_the_start(site: Site) -> None:
    name = site.running("deaf", "stop_timeout = 2")
    site.host.write(f"{VMS}/{name}.toml", "stop_timeout = 600\n")
    wait_for(site, name, "RestartNeeded", value=True)
    begin = time.monotonic()
    site.host.run(["vm-stop", name], user=USER)
    assert time.monotonic() - begin < 10


def test_a_removed_vm_runs_on_until_it_stops(site: Site) -> None:
    name = site.running()
    site.host.run(["rm", f"{VMS}/{name}.toml"])
    wait_for(site, name, "RestartNeeded", value=True)
    assert site.vm_run(name, "echo", "fine").stdout == "fine\n"
    site.host.run(["vm-stop", name], user=USER)
    site.host.wait_until(f"! test -e /run/vmsilo/{name}-command.socket", seconds=10)
    site.host.wait_until(f"! vmsilo list | grep -q '^{name} '", seconds=10)


def test_drop_ins_and_the_rename_of_an_editor(site: Site) -> None:
    name = site.define("memory = 300\ncpus = 1")
    site.host.write(f"{VMS}/{name}.toml.d/50-more.toml", "memory = 500\n")
    wait_for(site, name, "Memory", 500)
    assert site.show(name)["Cpus"] == 1
    new = f"{VMS}/.{name}.toml.swp"
    site.host.run(f"printf 'memory = 300\\ncpus = 4\\n' > {new} && mv {new} {VMS}/{name}.toml")
    wait_for(site, name, "Cpus", 4)
    assert site.show(name)["Memory"] == 500
    site.host.write(f"{VMS}/{name}.toml.d/50-more.toml", "memory = 600\n")
    wait_for(site, name, "Memory", 600)
    site.host.run(["rm", "-r", f"{VMS}/{name}.toml.d"])
    wait_for(site, name, "Memory", 300)


def test_one_daemon_reload_per_change_and_none_without_one(site: Site) -> None:
    def count_reloads() -> int:
        journal = site.host.run(["journalctl", "-q", "-o", "cat", "_PID=1"]).stdout
        return journal.splitlines().count("Reloading...")

    name = site.define("memory = 300")
    others = [site.define(wait=False) for _ in range(4)]
    for other in others:
        site.wait_for_socket(other)
    before = count_reloads()
    site.host.write(f"{VMS}/{name}.toml", "memory = 300\nstop_timeout = 7\n")
    site.host.wait_until(f"systemctl show -P TimeoutStopUSec {unit(name)} | grep -qx 17s", seconds=10)
    time.sleep(1)
    assert count_reloads() == before + 1
    site.host.run(["touch", f"{VMS}/{name}.toml"])
    site.host.run(["busctl", "call", "org.vmsilo1", "/org/vmsilo1", "org.vmsilo1.Manager", "Reload"])
    assert count_reloads() == before + 1
    assert site.vm_run(name, "true").returncode == 0
    assert count_reloads() == before + 1  # a start writes no unit either


def test_a_new_owner(site: Site) -> None:
    name = site.define()
    assert site.vm_run(name, "true").returncode == 0
    site.host.run(["vm-stop", name], user=USER)
    try:
        site.host.write("/etc/vmsilo/vmsilo.toml", 'user = "mallory"\nshared_home = false\n')
        site.host.wait_until(f"test $(stat -c %U /run/vmsilo/{name}-command.socket) = mallory", seconds=15)
        assert site.vm_run(name, "echo", "mine", user="mallory").stdout == "mine\n"
        assert site.vm_run(name, "true").returncode == 125
        site.host.run(["vm-stop", name], user="mallory")
    finally:
        site.host.write("/etc/vmsilo/vmsilo.toml", 'user = "user"\nshared_home = false\n')
        site.host.wait_until(f"test $(stat -c %U /run/vmsilo/{name}-command.socket) = user", seconds=15)


def test_a_broken_global_file_disables_all_and_mends(site: Site) -> None:
    running, stopped = site.running(), site.define()
    try:
        site.host.write("/etc/vmsilo/vmsilo.toml", 'user = "nobody-there"\n')
        site.host.wait_until(f"vmsilo list | grep -q '^{stopped} .*broken'", seconds=10)
        assert site.vm_run(running, "echo", "fine").stdout == "fine\n"
    finally:
        site.host.write("/etc/vmsilo/vmsilo.toml", 'user = "user"\nshared_home = false\n')
        site.wait_for_socket(stopped)
    assert site.vm_run(stopped, "echo", "fine").stdout == "fine\n"


def test_a_missing_image_is_said(site: Site) -> None:
    name = site.define('image = "nothing"')
    done = site.vm_run(name, "true")
    assert done.returncode == 125
    assert "image 'nothing' has no usable current version" in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    site.expect("image 'nothing' has no usable current version|Failed to start")
