"""Guests that do what they must not: the client says so in a line and ends, and nobody else notices."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest
from hosts.layers import USER
from hosts.standin.terminal import Terminal

if TYPE_CHECKING:
    from hosts.standin.site import Site

# mode -> what the client says
LINES = {
    "garbage": "vm-run: the guest broke the protocol: frame type 0 ",
    "giant": "vm-run: the guest broke the protocol: frame type 17 with 4294967295 bytes",
    "lies": "vm-run: the guest broke the protocol: more input consumed than was sent",
    "half-close": "vm-run: the connection to the guest was lost",
    "escapes": "vm-run: no",
}


@pytest.mark.parametrize("mode", sorted(LINES))
def test_the_client_ends_with_one_clear_line(site: Site, mode: str) -> None:
    good = site.running()
    name = site.define(mode=mode)
    begin = time.monotonic()
    done = site.vm_run(name, "true")
    assert time.monotonic() - begin < 10
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith(LINES[mode])
    assert done.stderr.count("\n") == 1
    assert all(char.isprintable() for char in done.stderr.rstrip("\n"))
    assert site.vm_run(good, "echo", "fine").stdout == "fine\n"
    assert site.vm_run("--root", name, "true").returncode == 125


@pytest.mark.parametrize("mode", ["escapes", "garbage"])
def test_a_terminal_sees_nothing_of_it(site: Site, mode: str) -> None:
    name = site.define(mode=mode)
    with Terminal(site.host, ["vm-run", name, "true"]) as terminal:
        assert terminal.wait() == 125
    shown = terminal.shown.replace(b"\x1b[K", b"")  # the client's own: erases its progress line
    assert b"\x1b" not in shown
    assert b"\x07" not in shown
    assert "\u202e".encode() not in shown


def test_output_at_a_terminal_is_filtered(site: Site) -> None:
    name = site.running()
    hostile = r"printf 'a\033]0;title\007b\033[2J\033[6nc\033[31mred\033[0m\302\233d\n'"
    with Terminal(site.host, ["vm-run", name, "sh", "-c", hostile]) as terminal:
        assert terminal.wait() == 0
    assert b"\x1b]0" not in terminal.shown
    assert b"\x1b[2J" not in terminal.shown
    assert b"\x1b[6n" not in terminal.shown
    assert b"\x1b[31mred\x1b[0m" in terminal.shown
    with Terminal(site.host, ["vm-run", "--escapes", "all", name, "sh", "-c", hostile]) as terminal:
        assert terminal.wait() == 0
    assert b"\x1b[2J" in terminal.shown
    assert site.vm_run(name, "sh", "-c", hostile).stdout.startswith("a\x1b]0;")  # a pipe gets the bytes


def test_a_terminal_of_its_own(site: Site) -> None:
    name = site.running()
    with Terminal(site.host, ["vm-run", name, "sh", "-c", "stty size; read x; echo got $x"]) as terminal:
        terminal.read_until(b"24 80")
        terminal.type(b"word\r")
        terminal.read_until(b"got word")
        assert terminal.wait() == 0


def test_a_silent_guest_can_be_left(site: Site) -> None:
    name = site.define(mode="silent")
    with Terminal(site.host, ["vm-run", name, "true"]) as terminal:
        site.wait_for_state(name, "running")
        time.sleep(0.5)
        terminal.type(b"\r~.")
        begin = time.monotonic()
        assert terminal.wait() == 128 + signal.SIGHUP
        assert time.monotonic() - begin < 5
    client = site.spawn("vm-run", name, "true", stderr=-1)
    time.sleep(1)
    for _ in range(3):
        site.host.run(["pkill", "-INT", "-f", f"vm-run {name} true"], check=False)
        time.sleep(0.1)
    assert client.wait(10) == 128 + signal.SIGINT


def test_a_flood_ends_with_its_reader(site: Site) -> None:
    name = site.define(mode="flood")
    begin = time.monotonic()
    done = site.host.run(f"vm-run {name} true | head -c 1000 | wc -c", user=USER)
    assert done.stdout.strip() == "1000"
    assert time.monotonic() - begin < 10


def test_a_chattering_guest_does_not_disturb_the_relay(site: Site) -> None:
    good = site.running()
    name = site.define(mode="chatter")
    client = site.spawn("vm-run", name, "echo", "works")
    for _ in range(5):
        assert site.vm_run(good, "echo", "fine", timeout=10).stdout == "fine\n"
    assert client.wait(60) == 0
    status = site.show(name)["Status"]
    assert status.isprintable()
    assert len(status) <= 120


def test_a_hostile_guest_stops_like_any_other(site: Site) -> None:
    name = site.define("stop_timeout = 2", mode="silent")
    site.host.run(["vm-start", "--wait", name], user=USER)
    begin = time.monotonic()
    site.host.run(["vm-stop", name], user=USER)
    assert time.monotonic() - begin < 20
    assert site.state(name) == "stopped"


def test_a_guest_cannot_name_itself_another(site: Site) -> None:
    """Its messages come over a socket of its own: READY=1 of one VM makes no other one ready."""
    waiting = site.define("start_timeout = 60", mode="never-ready")
    site.host.run(["systemctl", "start", f"vmsilo-{waiting}-vm.service"])
    name = site.running()
    path = f"/run/vmsilo/vm/{waiting}/vsock/vsock_701"
    attempt = f"import socket as s; s.socket(s.AF_UNIX).connect('{path}')"
    done = site.vm_run(name, "python3", "-c", attempt)
    assert "PermissionError" in done.stderr
    assert site.state(waiting) == "starting"
