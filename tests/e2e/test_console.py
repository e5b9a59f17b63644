"""The console of a real guest: its boot, its login, and the size of the terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hosts.standin.terminal import Terminal

if TYPE_CHECKING:
    from hosts.container import Container

PROMPT = b"user@demo:~$ "
LOGIN_SECONDS = 60


def shell(host: Container, *options: str) -> Terminal:
    """With the terminal as vm-shell's controlling one, so that it hears of sizes."""
    return Terminal(host, ["setsid", "-c", "-w", "vm-shell", *options, "demo"], user="user")


def wait_for_size(terminal: Terminal, rows: int, cols: int) -> None:
    """The guest hears it through its agent, beside the keys."""
    deadline = time.monotonic() + 60
    expected = f"{rows} {cols}\r\n".encode()
    while True:
        terminal.shown = b""
        terminal.type(b"stty size; echo d''one\r")
        terminal.read_until(b"done")
        if expected in terminal.shown:
            return
        assert time.monotonic() < deadline, terminal.shown
        time.sleep(0.5)


def test_the_user_is_logged_in_on_the_console(demo: Container) -> None:
    with shell(demo) as terminal:
        terminal.read_until(PROMPT, seconds=LOGIN_SECONDS)
        terminal.type(b"id; tty; echo $TERM d''one\r")
        terminal.read_until(b"dumb done")
        assert b"uid=1000(user)" in terminal.shown
        assert b"\r\n/dev/hvc0\r\n" in terminal.shown
        terminal.type(b"\x1d")
        assert terminal.wait() == 0
    with shell(demo) as terminal:
        terminal.read_until(b"uid=1000(user)")  # what was shown before, and the shell is the same
        terminal.read_until(b"dumb done\r\n" + PROMPT)
        terminal.shown = b""
        terminal.type(b"exit\r")
        terminal.read_until(PROMPT, seconds=LOGIN_SECONDS)  # the next login
        terminal.type(b"\x1d")
        assert terminal.wait() == 0


def test_the_guest_knows_the_terminals_size(demo: Container) -> None:
    with shell(demo) as terminal:
        terminal.read_until(PROMPT, seconds=LOGIN_SECONDS)
        wait_for_size(terminal, 24, 80)
        terminal.resize(50, 132)
        wait_for_size(terminal, 50, 132)
        terminal.type(b"\x1d")
        assert terminal.wait() == 0


def test_the_boot_is_in_the_journal_of_the_vms_unit(demo: Container) -> None:
    lines = demo.run("journalctl -q -o cat -u vmsilo-demo-vm.service").stdout.splitlines()
    console = [line for line in lines if line.startswith("console: ")]
    assert any("Reached target" in line and "multi-user.target" in line for line in console), console
    assert not [line for line in lines if "\x1b" in line]


def test_a_boot_is_seen_from_its_beginning_and_to_its_end(demo: Container) -> None:
    demo.run(["vm-stop", "demo"], user="user")
    with shell(demo, "--start") as terminal:
        terminal.read_until(PROMPT, seconds=120)
        assert b"multi-user.target" in terminal.shown
        demo.run(["vm-stop", "demo"], user="user")
        assert terminal.wait(60) == 0
        assert b"vm-shell: VM 'demo' has ended" in terminal.shown


def test_exec_is_a_login_shell_of_the_user(demo: Container) -> None:
    with shell(demo, "--exec") as terminal:
        terminal.read_until(PROMPT, seconds=LOGIN_SECONDS)
        terminal.type(b"shopt login_shell; stty size; id -un; exit 5\r")
        assert terminal.wait() == 5
    assert b"login_shell    \ton\r\n24 80\r\nuser\r\n" in terminal.shown
