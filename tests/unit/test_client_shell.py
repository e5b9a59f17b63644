"""vm-shell on a terminal and on pipes, against a console socket that speaks the protocol."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from client_host import end, site_dirs, write_program
from client_host_bus import fake_daemon, message_bus, vm
from client_host_console import Attached, ConsoleSocket, console_socket, serving
from client_host_terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GREETING = b"vm-shell: console of banking (Ctrl-] leaves)\r\n"


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    return write_program(tmp_path, "vm-shell", interpreter_path=site_dirs())


@pytest.fixture
def console(tmp_path: Path) -> Iterator[ConsoleSocket]:
    with console_socket(tmp_path) as console:
        yield console


def run(
    argv: list[str], *args: str, bus: str = "unix:path=/nonexistent"
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": bus}
    return subprocess.run(
        [*argv, *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=env,
    )


def test_keys_and_output_pass_and_ctrl_bracket_leaves(argv: list[str], console: ConsoleSocket) -> None:
    with Terminal([*argv, "banking"]) as terminal:
        client = console.next()
        assert client.asked == {"history": True, "write": "ask"}
        client.welcome()
        client.send("O", b"login: ")
        client.send("H")
        terminal.read_until(b"login: ")
        assert terminal.screen == GREETING + b"login: "
        terminal.wait_raw()
        terminal.type(b"id\r\x03\x1a\x04~.")
        assert client.read_input(8) == b"id\r\x03\x1a\x04~."
        terminal.type(b"last\x1dnever")
        assert client.read_input(4) == b"last"
        assert client.is_gone()
        assert terminal.wait() == 0
        assert terminal.screen.endswith(b"vm-shell: left the console of banking\r\n")
        assert terminal.current_modes() == terminal.modes


def test_the_vms_end_ends_it_after_its_last_output(argv: list[str], console: ConsoleSocket) -> None:
    with Terminal([*argv, "--no-history", "banking"]) as terminal:
        client = console.next()
        assert client.asked == {"history": False, "write": "ask"}
        client.welcome()
        for _ in range(50):
            client.send("O", b"x" * 4000 + b"\r\n")
        client.send("O", b"\x1b[31mgoodbye")
        client.send("E", {"reason": "ended"})
        assert terminal.wait() == 0
        assert terminal.screen.count(b"x") == 50 * 4000
        assert terminal.screen.endswith(b"\x1b[31mgoodbye\x1b[0mvm-shell: VM 'banking' has ended\r\n")
        assert terminal.current_modes() == terminal.modes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_leave_and_restore(argv: list[str], console: ConsoleSocket, number: int) -> None:
    with Terminal([*argv, "banking"]) as terminal:
        console.next().welcome()
        terminal.wait_raw()
        terminal.process.send_signal(number)
        assert terminal.wait() == 128 + number
        assert terminal.current_modes() == terminal.modes


@pytest.mark.parametrize("answer", ["nothing", "not JSON", "a list"])
def test_a_service_that_is_broken_gives_an_error_and_the_terminal_back(
    argv: list[str], console: ConsoleSocket, answer: str
) -> None:
    with Terminal([*argv, "banking"]) as terminal:
        client = console.next()
        if answer == "nothing":
            client.sock.close()
        else:
            client.welcome()
            terminal.wait_raw()
            client.send("W", b"nonsense" if answer == "not JSON" else b"[]")
        assert terminal.wait() == 1
        assert b"vm-shell: " in terminal.screen
        assert b"Traceback" not in terminal.screen
        assert terminal.current_modes() == terminal.modes


def test_hostile_output_is_filtered_on_a_terminal(argv: list[str], console: ConsoleSocket) -> None:
    hostile = b"a\x1b]0;title\x07b\x1b[2J\x1b[6nc\x1bPq\x1b\\d\x9d52;c;aGk=\x9ce\x1b[32mf\xe2\x80\xaeg\r\n"
    with Terminal([*argv, "banking"]) as terminal:
        client = console.next()
        client.welcome()
        client.send("O", hostile[:5])  # a sequence in two packets
        client.send("O", hostile[5:])
        client.send("O", b"END")
        terminal.read_until(b"END")
        shown = terminal.screen.removeprefix(GREETING)
        assert b"\x1b[32mf" in shown
        assert b"title" not in shown
        assert not {b"\x1b]", b"\x1b[2J", b"\x1b[6n", b"\x1bP"} & {
            shown[i : i + n] for n in (2, 4) for i in range(99)
        }
        terminal.type(b"\x1d")
        assert terminal.wait() == 0


def test_all_escapes_pass_where_they_are_asked_for(argv: list[str], console: ConsoleSocket) -> None:
    with Terminal([*argv, "--escapes", "all", "banking"]) as terminal:
        client = console.next()
        client.welcome()
        client.send("O", b"\x1b[2J\x1b]0;t\x07END")
        terminal.read_until(b"END")
        assert b"\x1b[2J\x1b]0;t\x07END" in terminal.screen
        terminal.type(b"\x1d")
        assert terminal.wait() == 0


def test_read_only_sends_no_keys_and_says_who_writes(argv: list[str], console: ConsoleSocket) -> None:
    with Terminal([*argv, "--read-only", "banking"]) as terminal:
        client = console.next()
        assert client.asked["write"] == "no"
        client.welcome(writer=False, writer_pid=4711)
        terminal.read_until(b"read-only: process 4711 writes\r\n")
        assert b"--take" not in terminal.screen
        terminal.wait_raw()
        terminal.type(b"keys\r")
        client.send("O", b"shown")
        terminal.read_until(b"shown")
        terminal.type(b"\x1d")
        assert terminal.wait() == 0
        assert client.is_gone()  # and before that, nothing was sent


def test_the_writer_changes(argv: list[str], console: ConsoleSocket) -> None:
    with Terminal([*argv, "--take", "banking"]) as terminal:
        client = console.next()
        assert client.asked["write"] == "take"
        client.welcome()
        terminal.wait_raw()
        terminal.type(b"a")
        assert client.read_input(1) == b"a"
        client.send("W", {"writer": False, "writer_pid": 99})
        terminal.read_until(b"read-only from here: process 99 writes\r\n")
        terminal.type(b"lost")
        client.send("W", {"writer": True, "writer_pid": terminal.process.pid})
        terminal.read_until(b"you write now\r\n")
        terminal.type(b"b")
        got = client.read_input(1)
        while not got.endswith(b"b"):
            got += client.read_input(1)
        assert got in (b"b", b"lostb"), "typed before, it may have been read after the change, but whole"
        terminal.type(b"\x1d")
        assert terminal.wait() == 0


def test_a_second_reader_is_told_how_to_write(argv: list[str], console: ConsoleSocket) -> None:
    with Terminal([*argv, "banking"]) as terminal:
        console.next().welcome(writer=False, writer_pid=None)
        terminal.read_until(
            b"read-only: nobody writes\r\nvm-shell: to write here: vm-shell --take banking\r\n"
        )
        terminal.type(b"\x1d")
        assert terminal.wait() == 0


def test_lost_bytes_are_told(argv: list[str], console: ConsoleSocket) -> None:
    with Terminal([*argv, "banking"]) as terminal:
        client = console.next()
        client.welcome()
        client.send("L", {"lost": 12345})
        terminal.read_until(b"vm-shell: 12345 bytes of the console were lost here\r\n")
        terminal.type(b"\x1d")
        assert terminal.wait() == 0


def test_a_restart_of_the_service_is_survived(argv: list[str], console: ConsoleSocket) -> None:
    with Terminal([*argv, "banking"]) as terminal:
        client = console.next()
        client.welcome()
        client.send("O", b"before")
        terminal.read_until(b"before")
        client.sock.close()
        client = console.next()
        assert client.asked == {"history": False, "write": "ask"}
        terminal.type(b"early")
        time.sleep(0.1)
        assert terminal.process.poll() is None
        client.welcome()
        terminal.read_until(b"the console service was restarted")
        assert client.read_input(5) == b"early"
        client.send("O", b"after")
        terminal.read_until(b"after")
        terminal.type(b"\x1d")
        assert terminal.wait() == 0
        assert terminal.current_modes() == terminal.modes


def test_a_guest_that_takes_no_keys_cannot_keep_the_user(argv: list[str], console: ConsoleSocket) -> None:
    with Terminal([*argv, "banking"]) as terminal:
        client = console.next()
        client.welcome()
        terminal.wait_raw()
        for _ in range(200):
            terminal.type(b"k" * 4000)
        terminal.type(b"\x1d")
        assert terminal.wait() == 0


def test_a_stopped_vm_is_one_line_and_a_hint(argv: list[str], console: ConsoleSocket) -> None:
    def serve(client: Attached) -> None:
        client.welcome(running=False, writer=False)
        with contextlib.suppress(BrokenPipeError):  # the first word was enough for it
            client.send("O", b"old words")
            client.send("E", {"reason": "stopped"})

    with serving(console, serve):
        done = run(argv, "banking")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "vm-shell: VM 'banking' is not running",
        "hint: vm-shell --start banking; vm-shell --log banking shows its last console",
    ]


@pytest.mark.parametrize("running", [True, False])
def test_the_log_is_printed_as_it_is(argv: list[str], console: ConsoleSocket, *, running: bool) -> None:
    log = b"".join(b"line %d \x1b]0;raw\x07\n" % n for n in range(20000))

    def serve(client: Attached) -> None:
        assert client.asked == {"history": True, "write": "no"}
        client.welcome(running=running, writer=False)
        for at in range(0, len(log), 32768):
            client.send("O", log[at : at + 32768])
        client.send("H")
        with contextlib.suppress(BrokenPipeError):  # it may be gone by now
            if running:
                client.send("O", b"live output")
            else:
                client.send("E", {"reason": "stopped"})
        assert client.is_gone()

    with serving(console, serve):
        done = run(argv, "--log", "banking")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.encode() == log


def test_a_pipe_is_sent_whole_and_the_output_goes_on(argv: list[str], console: ConsoleSocket) -> None:
    data = os.urandom(300_000) + b"\x1d"
    pipe = subprocess.PIPE
    process = subprocess.Popen([*argv, "banking"], stdin=pipe, stdout=pipe, stderr=pipe)

    def serve(client: Attached) -> None:
        client.welcome()
        assert client.read_input(len(data)) == data
        time.sleep(0.2)
        client.send("O", b"\x1b]0;as it is\x07")
        client.send("E", {"reason": "ended"})

    with serving(console, serve):
        assert process.stdin is not None
        process.stdin.write(data)
        process.stdin.close()
        process.stdin = None
        status, out, err = end(process)
    assert (status, out) == (0, b"\x1b]0;as it is\x07")
    assert err.splitlines()[-1] == b"vm-shell: VM 'banking' has ended"


def test_an_interrupt_ends_it_without_a_terminal(argv: list[str], console: ConsoleSocket) -> None:
    process = subprocess.Popen([*argv, "banking"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    console.next().welcome()
    assert process.stderr is not None
    assert process.stderr.readline() == b"vm-shell: console of banking (Ctrl-] leaves)\n"
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 130


def test_output_that_nobody_reads_any_more(argv: list[str], console: ConsoleSocket) -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen([*argv, "banking"], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    client = console.next()
    client.welcome()
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    client.send("O", b"x")
    assert end(process)[0] == 141


def test_a_refusal_is_shown_without_its_tricks(argv: list[str], console: ConsoleSocket) -> None:
    def serve(client: Attached) -> None:
        client.send(
            "X", {"code": "busy", "message": "too many\x1b]0;x\x07 clients", "hint": "leave one\nnow"}
        )

    with serving(console, serve):
        done = run(argv, "banking")
    assert done.returncode == 1
    assert done.stderr == "vm-shell: VM 'banking': too many ]0;x  clients\nhint: leave one now\n"


def test_a_refusal_before_the_question(argv: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "run" / "banking-console"))
        listener.listen()
        process = subprocess.Popen([*argv, "banking"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        sock, _ = listener.accept()
        with sock:
            sock.send(b'X{"code":"busy","message":"too many clients","hint":""}')
            sock.shutdown(socket.SHUT_RDWR)
            _, _, err = end(process)
    assert err == b"vm-shell: VM 'banking': too many clients\n"


def test_another_users_console(argv: list[str], console: ConsoleSocket) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to become another user")
    console.path.chmod(0o600)
    for path in (console.path.parent, *console.path.parent.parents):
        if path.stat().st_uid == 0 and path.is_relative_to("/tmp"):
            path.chmod(0o755)
    code = f"import os, sys; os.setuid(65534); os.execv({sys.executable!r}, {[*argv, 'banking']!r})"
    done = run([sys.executable, "-c", code])
    if done.returncode not in (1, 2) or "vm-shell" not in done.stderr:
        pytest.skip("another user cannot read this tree")
    assert "VM 'banking' belongs to another user" in done.stderr


def test_absent_consoles_are_explained(argv: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with message_bus(tmp_path) as bus, fake_daemon(bus) as daemon:
        daemon.vms = [vm("banking"), vm("torn", "broken")]
        assert "no VM 'bankin'\nhint: did you mean 'banking'?" in run(argv, "bankin", bus=bus).stderr
        assert "broken configuration" in run(argv, "torn", bus=bus).stderr
        done = run(argv, "banking", bus=bus)
        assert done.returncode == 1
        assert "has no console socket\nhint: systemctl status vmsilo-consoled\n" in done.stderr


def test_start_starts_first(argv: list[str], tmp_path: Path, console: ConsoleSocket) -> None:
    with message_bus(tmp_path) as bus, fake_daemon(bus) as daemon:

        def serve(client: Attached) -> None:
            assert [(m, body[0], dict(body[1])) for m, body in daemon.calls] == [
                ("Start", "banking", {"wait": ("b", False)})
            ]
            client.welcome()
            client.send("E", {"reason": "ended"})

        with serving(console, serve):
            assert run(argv, "--start", "banking", bus=bus).returncode == 0


def test_a_stop_and_continue(argv: list[str], console: ConsoleSocket) -> None:
    with Terminal([*argv, "banking"]) as terminal:
        client = console.next()
        client.welcome()
        terminal.wait_raw()
        terminal.process.send_signal(signal.SIGTSTP)  # an orphaned group: it comes back at once
        terminal.process.send_signal(signal.SIGCONT)
        client.send("O", b"again")
        terminal.read_until(b"again")
        terminal.wait_raw()
        terminal.type(b"\x1d")
        assert terminal.wait() == 0
        assert terminal.current_modes() == terminal.modes
