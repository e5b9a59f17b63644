"""Whose a console is when the configuration changes under a VM that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hosts.standin.site import Site

BOOTED = "standin: the guest's console"
GLOBAL = "/etc/vmsilo/vmsilo.toml"


def log_of(site: Site, name: str, user: str) -> tuple[int, str]:
    done = site.host.run(["vm-shell", "--log", name], user=user, check=False)
    return done.returncode, done.stdout


def wait_for_owner(site: Site, name: str, user: str) -> None:
    site.host.wait_until(f"test $(stat -c %U /run/vmsilo/{name}-console) = {user}", seconds=15)


def test_a_new_owner_gets_the_console_when_the_vm_has_stopped_and_not_its_past(site: Site) -> None:
    name = site.running()
    try:
        site.host.write(GLOBAL, 'user = "mallory"\nshared_home = false\n')
        site.host.wait_until(f"vmsilo list | grep -q '^{name} .*restart needed'", seconds=15)
        assert log_of(site, name, "mallory")[0] == 1
        assert BOOTED in log_of(site, name, "user")[1]
        site.host.run(["vm-stop", name])
        wait_for_owner(site, name, "mallory")
        assert log_of(site, name, "mallory") == (0, "")
        assert log_of(site, name, "user")[0] == 1
    finally:
        site.host.write(GLOBAL, 'user = "user"\nshared_home = false\n')
        wait_for_owner(site, name, "user")


def test_a_vm_that_is_removed_while_it_runs_keeps_its_console_until_it_ends(site: Site) -> None:
    name = site.running()
    site.host.run(["rm", f"/etc/vmsilo/vms.d/{name}.toml"])
    site.host.wait_until(f"vmsilo list | grep -q '^{name} .*restart needed'", seconds=15)
    assert BOOTED in log_of(site, name, "user")[1]
    site.host.run(["vm-stop", name])
    site.host.wait_until(f"test ! -e /run/vmsilo/{name}-console", seconds=15)
