"""vm-shell: the consoles of VMs, who may see and type what, and what survives which daemon's death."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from hosts.standin.site import unit
from hosts.standin.terminal import Terminal

if TYPE_CHECKING:
    from hosts.standin.site import Site

CONSOLED = "vmsilo-consoled.service"
BOOTED = b"standin: the guest's console"


def attach(site: Site, name: str, *options: str) -> Terminal:
    return Terminal(site.host, ["vm-shell", *options, name], user="user")


def leave(terminal: Terminal) -> None:
    terminal.type(b"\x1d")
    assert terminal.wait() == 0


def log_of(site: Site, name: str) -> str:
    return site.host.run(["vm-shell", "--log", name], user="user").stdout


def kill(site: Site, daemon: str) -> None:
    before = site.daemon_pid(daemon)
    site.host.run(["systemctl", "kill", "--kill-whom=main", "--signal=KILL", daemon])
    site.host.wait_until(
        f"systemctl -q is-active {daemon} && [ $(systemctl show -P MainPID {daemon}) != {before} ]",
        seconds=20,
    )


def console_lines(site: Site, name: str) -> dict[str, str]:
    """Priorities of the console's lines in the journal of the VM's unit."""
    out = site.host.run(["journalctl", "-q", "-o", "json", "-u", unit(name)]).stdout
    entries = [json.loads(line) for line in out.splitlines()]
    return {e["MESSAGE"]: e["PRIORITY"] for e in entries if str(e["MESSAGE"]).startswith("console: ")}


def wait_for_line(site: Site, name: str, line: str, seconds: float = 10) -> str:
    deadline = time.monotonic() + seconds
    while line not in (lines := console_lines(site, name)):
        assert time.monotonic() < deadline, lines
        time.sleep(0.1)
    return lines[line]


def test_history_keys_and_leaving(site: Site) -> None:
    name = site.running()
    with attach(site, name) as terminal:
        terminal.read_until(f"vm-shell: console of {name} (Ctrl-] leaves)".encode())
        terminal.read_until(BOOTED)
        terminal.type(b"keys\r")
        terminal.read_until(b"typed: KEYS")
        leave(terminal)
    assert b"hostile title" not in terminal.shown
    assert site.state(name) == "running"
    assert "\x1b]0;hostile title\x07standin: the guest's console\ntyped: KEYS" in log_of(site, name)
    with attach(site, name, "--no-history") as terminal:
        terminal.read_until(b"console of")
        terminal.type(b"more\r")
        terminal.read_until(b"typed: MORE")
        leave(terminal)
    assert BOOTED not in terminal.shown


def test_one_writes_and_others_read(site: Site) -> None:
    name = site.running()
    with attach(site, name) as first:
        first.read_until(BOOTED)
        with attach(site, name) as second, attach(site, name, "--read-only") as third:
            second.read_until(b"vm-shell: read-only: process ")
            third.read_until(b"vm-shell: read-only: process ")
            third.read_until(BOOTED)
            second.type(b"not heard\r")
            first.type(b"one\r")
            for terminal in (first, second, third):
                terminal.read_until(b"typed: ONE")
            with attach(site, name, "--take") as taker:
                first.read_until(b"vm-shell: read-only from here: process ")
                first.type(b"nor this\r")
                taker.type(b"two\r")
                for terminal in (first, second, third, taker):
                    terminal.read_until(b"typed: TWO")
                leave(taker)
            leave(second)
            leave(third)
        leave(first)
    assert "HEARD" not in log_of(site, name)
    assert "NOR" not in log_of(site, name)


def test_a_stopped_vm_has_only_its_log(site: Site) -> None:
    name = site.running()
    with attach(site, name) as terminal:
        terminal.read_until(BOOTED)
        site.host.run(["vm-stop", name], user="user")
        assert terminal.wait() == 0
        assert f"vm-shell: VM '{name}' has ended".encode() in terminal.shown
    done = site.host.run(["vm-shell", name], user="user", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"vm-shell: VM '{name}' is not running\nhint: vm-shell --start {name}")
    assert BOOTED.decode() in log_of(site, name)
    assert site.state(name) == "stopped"
    with attach(site, name, "--start") as terminal:
        terminal.read_until(BOOTED)
        terminal.type(b"up\r")
        terminal.read_until(b"typed: UP")
        leave(terminal)
    assert "has ended" not in log_of(site, name)


def test_consoled_is_killed_under_a_console(site: Site) -> None:
    name = site.running()
    pid = site.main_pid(name)
    with attach(site, name) as terminal:
        terminal.read_until(BOOTED)
        terminal.type(b"before\r")
        terminal.read_until(b"typed: BEFORE")
        kill(site, CONSOLED)
        terminal.read_until(b"the console service was restarted")
        terminal.type(b"after\r")
        terminal.read_until(b"typed: AFTER")
        leave(terminal)
    assert site.main_pid(name) == pid
    log = log_of(site, name)
    assert all(text in log for text in (BOOTED.decode(), "typed: BEFORE", "typed: AFTER"))
    wait_for_line(site, name, "console: typed: AFTER")


def test_consoled_is_killed_again_and_again(site: Site) -> None:
    name = site.running()
    for _ in range(4):
        kill(site, CONSOLED)
    with attach(site, name) as terminal:
        terminal.read_until(BOOTED)
        terminal.type(b"still\r")
        terminal.read_until(b"typed: STILL")
        leave(terminal)
    assert site.vm_run(name, "echo", "fine").stdout == "fine\n"


def test_vmsilod_is_killed_under_a_console(site: Site) -> None:
    name = site.running()
    with attach(site, name) as terminal:
        terminal.read_until(BOOTED)
        kill(site, "vmsilod.service")
        terminal.type(b"after\r")
        terminal.read_until(b"typed: AFTER")
        with attach(site, name, "--read-only") as second:
            second.read_until(b"typed: AFTER")
            leave(second)
        site.host.run(["vm-stop", name], user="user")
        assert terminal.wait() == 0
        assert b"has ended" in terminal.shown
    assert "typed: AFTER" in log_of(site, name)


def test_both_are_killed_and_the_vm_ends_meanwhile(site: Site) -> None:
    name = site.running()
    for daemon in ("vmsilod.service", CONSOLED):
        kill(site, daemon)
    site.host.run(["systemctl", "stop", unit(name)])
    site.wait_for_state(name, "stopped")
    assert BOOTED.decode() in log_of(site, name)
    assert site.host.run(["vm-shell", name], user="user", check=False).returncode == 1


def test_the_guests_lines_are_in_the_journal_of_its_unit_and_only_lines(site: Site) -> None:
    name = site.running()
    assert wait_for_line(site, name, f"console: {BOOTED.decode()}") == "6"
    with attach(site, name) as terminal:
        terminal.read_until(BOOTED)
        terminal.type(b"<3>evil\x1b]0;title\x07\x1b[31m\xff\x9b31mred\n<0>panic\r")
        terminal.read_until(b"PANIC")
        leave(terminal)
    wait_for_line(site, name, "console: <0>PANIC")
    lines = console_lines(site, name)
    assert set(lines.values()) == {"6"}
    assert any(line.startswith("console: typed: <3>EVIL") for line in lines)
    assert not [line for line in lines if "\x1b" in line or "TITLE" in line or "\n" in line]


def test_another_user_is_refused(site: Site) -> None:
    name = site.running()
    for option in ("--log", "--read-only", "--take"):
        done = site.host.run(["vm-shell", option, name], user="mallory", check=False)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith(f"vm-shell: VM '{name}' belongs to another user\n")
    mode, owner = site.host.run(f"stat -c '%a %U' /run/vmsilo/{name}-console").stdout.split()
    assert (mode, owner) == ("600", "user")


def test_root_may_look(site: Site) -> None:
    name = site.running()
    assert BOOTED.decode() in site.host.run(["vm-shell", "--log", name]).stdout


def test_a_vm_that_is_removed_takes_its_console_along(site: Site) -> None:
    name = site.define()
    site.host.wait_until(f"test -S /run/vmsilo/{name}-console")
    site.host.run(["rm", f"/etc/vmsilo/vms.d/{name}.toml"])
    site.host.wait_until(f"test ! -e /run/vmsilo/{name}-console")
    done = site.host.run(["vm-shell", "--log", name], user="user", check=False)
    assert done.returncode == 1
    assert f"no VM '{name}'" in done.stderr
