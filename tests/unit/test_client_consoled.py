"""vm-shell and vmsilo-consoled, both real, with terminals at both ends."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from client_host import write_program
from client_host_terminal import Terminal
from console_host import ConsoleHost, run_host
from vmsilo_console.ring import CAPACITY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from relay_host import Control


@pytest.fixture
def host(tmp_path: Path) -> Iterator[ConsoleHost]:
    (tmp_path / "run").mkdir()
    with run_host(tmp_path / "run") as host:
        yield host


@pytest.fixture
def control(host: ConsoleHost) -> Control:
    control = host.start()
    host.listen(control)
    return control


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    return write_program(tmp_path, "vm-shell")


def read_log(argv: list[str]) -> bytes:
    done = subprocess.run([*argv, "--log", "banking"], capture_output=True, timeout=30, check=True)
    assert done.stderr == b""
    return done.stdout


def leave(terminal: Terminal) -> None:
    terminal.type(b"\x1d")
    assert terminal.wait() == 0
    assert terminal.current_modes() == terminal.modes


def test_a_run_from_its_first_byte_to_its_end(host: ConsoleHost, control: Control, argv: list[str]) -> None:
    vmm = host.open(control)
    vmm.write(b"booting\r\n")
    with Terminal([*argv, "banking"]) as terminal:
        terminal.read_until(b"booting\r\n")
        terminal.wait_raw()
        terminal.type(b"id\r\x03")
        assert vmm.read(4) == b"id\r\x03"
        vmm.write(b"\x1b]0;t\x07uid=0\r\n")
        terminal.read_until(b"uid=0\r\n")
        vmm.write(b"last words\r\n")
        vmm.end()
        assert terminal.wait() == 0
        assert terminal.screen.endswith(b"uid=0\r\nlast words\r\nvm-shell: VM 'banking' has ended\r\n")
        assert terminal.current_modes() == terminal.modes
    assert read_log(argv) == b"booting\r\n\x1b]0;t\x07uid=0\r\nlast words\r\n"
    done = subprocess.run([*argv, "banking"], capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"vm-shell: VM 'banking' is not running\nhint: ")


def test_a_log_of_a_vm_that_never_ran_is_empty(host: ConsoleHost, control: Control, argv: list[str]) -> None:
    assert control.call("list")["vms"][0]["running"] is False
    assert read_log(argv) == b""
    assert host.manager.store


def test_a_whole_scroll_back_reaches_a_pipe(host: ConsoleHost, control: Control, argv: list[str]) -> None:
    data = b"".join(b"%09d\n" % number for number in range(CAPACITY // 10 + 500))
    vmm = host.open(control)
    vmm.write(data)
    with Terminal([*argv, "--no-history", "banking"]) as terminal:
        terminal.read_until(b"Ctrl-]")
        vmm.write(b"flushed")
        terminal.read_until(b"flushed")
        leave(terminal)
    assert (data + b"flushed").endswith(read_log(argv))
    assert len(read_log(argv)) > CAPACITY - 4096


def test_writers_and_readers(host: ConsoleHost, control: Control, argv: list[str]) -> None:
    vmm = host.open(control)
    with Terminal([*argv, "banking"]) as first:
        first.read_until(b"Ctrl-]")
        with (
            Terminal([*argv, "--read-only", "banking"]) as reader,
            Terminal([*argv, "--take", "banking"]) as taker,
        ):
            reader.read_until(b"vm-shell: read-only: process ")
            first.read_until(f"read-only from here: process {taker.process.pid} writes".encode())
            first.type(b"no")
            reader.type(b"no")
            taker.type(b"yes")
            assert vmm.read(3) == b"yes"
            vmm.write(b"seen by all")
            for terminal in (first, reader, taker):
                terminal.read_until(b"seen by all")
            leave(taker)
            leave(reader)
        leave(first)


def test_a_killed_consoled_comes_back_under_the_terminal(
    host: ConsoleHost, control: Control, argv: list[str]
) -> None:
    vmm = host.open(control)
    vmm.write(b"one ")
    with Terminal([*argv, "banking"]) as terminal:
        terminal.read_until(b"one ")
        host.kill()
        terminal.type(b"typed while it was away")
        vmm.write(b"two ")
        host.start()
        terminal.read_until(b"the console service was restarted")
        assert vmm.read(23) == b"typed while it was away"
        vmm.write(b"three")
        terminal.read_until(b"three")
        leave(terminal)
    assert read_log(argv) == b"one two three"


def test_a_guest_that_floods_while_the_user_types(
    host: ConsoleHost, control: Control, argv: list[str]
) -> None:
    vmm = host.open(control)
    with Terminal([*argv, "banking"]) as terminal:
        terminal.read_until(b"Ctrl-]")
        vmm.write(b"flood\x1b[" * 300_000)  # nobody reads the terminal meanwhile
        terminal.type(b"stop")
        assert vmm.read(4) == b"stop"
        vmm.write(b"\r\nEND")
        terminal.read_until(b"bytes of the console were lost here")
        terminal.read_until(b"END")
        leave(terminal)
