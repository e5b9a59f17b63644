"""vm-start-debug: a VM with its console on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hosts.standin.site import unit
from hosts.standin.terminal import Terminal

if TYPE_CHECKING:
    from hosts.standin.site import Site


def test_the_console_is_on_the_terminal(site: Site) -> None:
    name = site.define()
    with Terminal(site.host, ["vm-start-debug", name], user="root") as terminal:
        terminal.read_until(b"standin: the guest's console")
        terminal.type(b"keys\r")
        terminal.read_until(b"typed: KEYS")
        vm = site.wait_for_state(name, "running")
        assert vm["Unit"] == unit(name, "debug")
        assert site.host.run(f"systemctl -q is-active vmsilo-{name}.socket", check=False).returncode != 0
        terminal.type(b"\x1d")
        assert terminal.wait() == 0
    assert b"hostile title" not in terminal.shown
    assert f"VM '{name}' was ended".encode() in terminal.shown
    site.wait_for_socket(name)
    assert site.state(name) == "stopped"
    assert site.vm_run(name, "echo", "as usual").stdout == "as usual\n"


def test_the_guest_powers_off_under_the_terminal(site: Site) -> None:
    name = site.define()
    with Terminal(site.host, ["vm-start-debug", name], user="root") as terminal:
        terminal.read_until(b"standin: the guest's console")
        site.wait_for_state(name, "running")
        site.host.run(["vm-stop", name], user="user")
        assert terminal.wait() == 0
    assert f"VM '{name}' has ended".encode() in terminal.shown
    site.wait_for_socket(name)


def test_a_vmm_that_fails_shows_its_last_words(site: Site) -> None:
    site.expect("QEMU could not start the VM")
    name = site.define(mode="exit-1")
    with Terminal(site.host, ["vm-start-debug", name], user="root") as terminal:
        assert terminal.wait() == 1
    assert b"standin leaves with 1: as told" in terminal.shown
    assert b"could not start the VM" in terminal.shown
    site.wait_for_socket(name)


def test_a_terminal_that_goes_away_ends_the_vm(site: Site) -> None:
    name = site.define()
    with Terminal(site.host, ["vm-start-debug", name], user="root") as terminal:
        terminal.read_until(b"standin: the guest's console")
        site.wait_for_state(name, "running")
        terminal.hang_up()
        site.wait_for_state(name, "stopped", "failed")
    site.wait_for_socket(name)


def test_a_vm_that_runs_is_not_started_twice(site: Site) -> None:
    name = site.running()
    with Terminal(site.host, ["vm-start-debug", name], user="root") as terminal:
        assert terminal.wait() == 1
    assert f"VM '{name}' is running".encode() in terminal.shown
    assert site.vm_run(name, "echo", "fine").stdout == "fine\n"


def test_vmsilod_is_restarted_under_a_debug_start(site: Site) -> None:
    name = site.define()
    with Terminal(site.host, ["vm-start-debug", name], user="root") as terminal:
        terminal.read_until(b"standin: the guest's console")
        site.wait_for_state(name, "running")
        site.host.run("systemctl restart vmsilod.service")
        assert site.show(name)["Unit"] == unit(name, "debug")
        site.host.run(["vm-stop", name], user="user")
        terminal.wait()
    site.wait_for_socket(name)
