"""The commands that ask vmsilod, against a stand-in for it on a bus of the tests' own."""

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vmsilo_wire as wire
from client_host import command_socket, run_commands
from client_host_terminal import Terminal
from vmsilo_wire import payload

pytest.importorskip("jeepney")
from client_host_bus import FakeDaemon, Programs, fake_daemon, message_bus, vm


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[str]:
    with message_bus(tmp_path) as address:
        yield address


@pytest.fixture
def programs(tmp_path: Path, bus: str) -> Programs:
    return Programs(tmp_path, bus)


@pytest.fixture
def daemon(bus: str) -> Iterator[FakeDaemon]:
    with fake_daemon(bus) as daemon:
        yield daemon


# vm-run


def test_why_a_vm_failed(programs: Programs, daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.vms = [vm("banking", "failed", LastResult=("s", "exit-code: no kernel\x1b[2J"))]
    with command_socket(tmp_path, None):
        done = programs("vm-run", "banking", "x")
    assert done.returncode == 125
    assert done.stderr.decode() == (
        "vm-run: VM 'banking' failed to start: exit-code: no kernel [2J\n"
        "hint: journalctl -b -u vmsilo-banking-vm\n"
    )


def test_a_broken_configuration_is_named(programs: Programs, daemon: FakeDaemon) -> None:
    daemon.vms = [vm("banking", "broken", Problems=("as", ["memory: too small"]))]
    done = programs("vm-run", "banking", "x")
    assert done.stderr == (
        b"vm-run: VM 'banking' has a broken configuration: memory: too small\nhint: vmsilo check\n"
    )


def test_a_vm_that_stopped_meanwhile_is_tried_again(
    programs: Programs, daemon: FakeDaemon, tmp_path: Path
) -> None:
    daemon.vms = [vm("banking", "stopped")]
    with command_socket(tmp_path, run_commands) as host:
        host.refuse_first = True
        done = programs("vm-run", "banking", "echo", "again")
        assert (done.returncode, done.stdout, len(host.requests)) == (0, b"again\n", 2)


def test_a_start_that_somebody_ended_is_not_begun_again(
    programs: Programs, daemon: FakeDaemon, tmp_path: Path
) -> None:
    """It was under way when vm-run came, or begun for it; before that is another matter."""
    daemon.vms = [vm("banking", "stopped", StartOverMonotonic=("t", (1 << 64) - 1))]
    with command_socket(tmp_path, run_commands) as host:
        host.refuse_first = True
        done = programs("vm-run", "banking", "echo", "again")
        assert (done.returncode, len(host.requests)) == (125, 1)
        assert b"VM 'banking' was stopped while it started\n" in done.stderr
    daemon.vms = [vm("banking", "stopped", StartOverMonotonic=("t", time.monotonic_ns() // 1000))]
    (tmp_path / "run/banking-command.socket").unlink()
    with command_socket(tmp_path, run_commands) as host:
        host.refuse_first = True
        assert programs("vm-run", "banking", "echo", "again").stdout == b"again\n"


def test_a_second_silence_is_the_end(programs: Programs, daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.vms = [vm("banking", "stopped")]
    with command_socket(tmp_path, None) as host:
        done = programs("vm-run", "banking", "echo", "again")
        assert (done.returncode, len(host.requests)) == (125, 2)
        assert b"closed without an answer" in done.stderr


def test_no_start(programs: Programs, daemon: FakeDaemon, tmp_path: Path) -> None:
    with command_socket(tmp_path, run_commands) as host:
        assert programs("vm-run", "--no-start", "banking", "true").returncode == 0
        daemon.vms = [vm("banking", "stopped")]
        done = programs("vm-run", "--no-start", "banking", "true")
        assert (done.returncode, len(host.requests)) == (125, 1)
        assert done.stderr == b"vm-run: VM 'banking' is not running\nhint: vm-start banking\n"


def test_root_goes_over_the_bus(programs: Programs, daemon: FakeDaemon) -> None:
    theirs, ours = socket.socketpair()
    with theirs, ours:
        stdout = wire.encode_frame(wire.STDOUT, b"uid 0\n")
        ours.sendall(payload.encode_started(1) + stdout + payload.encode_exit(4))
        daemon.answers["Run"] = lambda _body: ("h", (theirs.fileno(),))
        done = programs("vm-run", "--root", "--cwd", "/", "--env", "A=b", "banking", "id", "-u")
    assert (done.returncode, done.stdout) == (4, b"uid 0\n")
    ((method, (name, argv, options)),) = daemon.calls
    assert (method, name, argv) == ("Run", "banking", ["id", "-u"])
    assert options["root"] == ("b", True)
    assert options["cwd"] == ("s", "/")
    assert options["env"][1]["A"] == "b"
    assert "rows" not in options
    assert daemon.flags & 4 == 0


COPYING = vm("banking", "starting", Status=("s", "copying image default into huge pages: 43%"))
BAR = b"starting banking: [########            ] 43% copying image"


def test_a_copy_that_is_waited_for_is_a_bar(programs: Programs, daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.vms = [COPYING]
    with command_socket(tmp_path, run_commands) as host:
        host.pause = 1.5
        with Terminal([*programs.argv("vm-run"), "banking", "true"], env=programs.env) as terminal:
            terminal.read_until(b"vm-run: " + BAR)
            assert terminal.wait() == 0
            assert b"\r\x1b[K" in terminal.screen  # and gone again


def test_a_start_shows_the_copy(programs: Programs, daemon: FakeDaemon) -> None:
    daemon.vms = [COPYING]
    daemon.seconds["Start"] = 1.5
    with Terminal([*programs.argv("vm-start"), "banking"], env=programs.env) as terminal:
        terminal.read_until(b"vm-start: " + BAR)
        assert terminal.wait() == 0


def test_nobody_is_shown_a_bar_without_a_terminal(programs: Programs, daemon: FakeDaemon) -> None:
    daemon.vms = [COPYING]
    daemon.seconds["Start"] = 1.5
    done = programs("vm-start", "banking")
    assert (done.returncode, done.stderr) == (0, b"")


def test_interactive_permission_only_at_a_terminal(programs: Programs, daemon: FakeDaemon) -> None:
    denied = ("Not allowed\x1b[2J to run as root\nhint: ask the owner",)
    daemon.answers["Run"] = lambda _body: ("org.vmsilo1.Error.Denied", denied)
    argv = [*programs.argv("vm-run"), "--root", "banking", "id"]
    with Terminal(argv, env=programs.env) as terminal:
        assert terminal.wait() == 125
        assert terminal.screen == b"vm-run: Not allowed [2J to run as root\r\nhint: ask the owner\r\n"
    assert daemon.flags & 4


# vm-start, vm-stop


@pytest.mark.parametrize(
    ("program", "args", "call"),
    [
        ("vm-start", ["banking"], ("Start", ("banking", {"wait": ("b", False)}))),
        ("vm-start", ["banking", "--wait"], ("Start", ("banking", {"wait": ("b", True)}))),
        ("vm-stop", ["banking"], ("Stop", ("banking", {}))),
        ("vm-stop", ["--timeout=7", "banking"], ("Stop", ("banking", {"timeout": ("u", 7)}))),
        ("vm-stop", ["--force", "banking"], ("Kill", ("banking",))),
    ],
)
def test_start_and_stop(
    programs: Programs, daemon: FakeDaemon, program: str, args: list[str], call: tuple[str, Any]
) -> None:
    done = programs(program, *args)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert daemon.calls == [call]


def test_errors_are_a_fact_and_a_hint(programs: Programs, daemon: FakeDaemon) -> None:
    text = "the image \x1b]0;x\x07'debian' is missing\nhint: vmsilo image build debian"
    daemon.answers["Start"] = lambda _body: ("org.vmsilo1.Error.Failed", (text,))
    done = programs("vm-start", "banking")
    assert done.returncode == 1
    assert done.stderr == (
        b"vm-start: the image  ]0;x 'debian' is missing\nhint: vmsilo image build debian\n"
    )


@pytest.mark.usefixtures("daemon")
def test_unknown_vm_and_wrong_line(programs: Programs) -> None:
    done = programs("vm-start", "bankin")
    assert (done.returncode, done.stderr) == (
        1,
        b"vm-start: no VM 'bankin'\nhint: did you mean 'banking'?\n",
    )
    assert programs("vm-stop", "../x").returncode == 2
    assert programs("vm-stop", "a", "b").returncode == 2
    assert programs("vm-stop", "--force", "--timeout", "3", "banking").returncode == 2


def test_without_a_daemon(programs: Programs) -> None:
    done = programs("vm-start", "banking")
    assert done.returncode == 1
    assert done.stderr == b"vm-start: vmsilo is not running\nhint: systemctl status vmsilod\n"


# vmsilo


def test_list_for_people(programs: Programs, daemon: FakeDaemon) -> None:
    since = int((time.time() - 3700) * 1e6)
    daemon.vms = [
        vm("work", "broken", Problems=("as", ["memory: \x1b[2Jtoo small", "cpus: 0"]), Vmm=("s", "")),
        vm("banking", RestartNeeded=("b", True), Since=("t", since)),
    ]
    done = programs("vmsilo", "list")
    assert done.returncode == 0
    lines = [line.split(maxsplit=7) for line in done.stdout.decode().splitlines()]
    assert lines[0] == ["NAME", "STATE", "VMM", "MEMORY", "CPUS", "UPTIME", "NOTE"]
    assert done.stdout.decode().splitlines()[1] == (
        "banking  running  crosvm  2048 MiB  4     1 h 1 min  restart needed"
    )
    assert done.stdout.decode().splitlines()[2] == (
        "work     broken   -       2048 MiB  4     -          memory:  [2Jtoo small (and 1 more)"
    )


def test_list_is_coloured_at_a_terminal_only(programs: Programs, daemon: FakeDaemon) -> None:
    daemon.vms = [vm("banking")]
    with Terminal([*programs.argv("vmsilo"), "status"], env=programs.env) as terminal:
        assert terminal.wait() == 0
        assert b"\x1b[32mrunning" in terminal.screen


def test_list_for_programs(programs: Programs, daemon: FakeDaemon) -> None:
    daemon.vms = [vm("banking", DependsOn=("as", ["net"]))]
    (shown,) = json.loads(programs("vmsilo", "list", "--json").stdout)
    assert (shown["Name"], shown["DependsOn"], shown["Memory"]) == ("banking", ["net"], 2048)


def test_status_of_one(programs: Programs, daemon: FakeDaemon) -> None:
    daemon.vms = [vm("banking", "stopped", RestartNeeded=("b", True), Problems=("as", ["one", "two"]))]
    done = programs("vmsilo", "status", "banking")
    assert done.returncode == 3
    assert b"\nproblem: one\nproblem: two\n" in done.stdout
    assert b"restart needed" in done.stdout
    assert b"Memory         2048 MiB\n" in done.stdout
    daemon.vms = [vm("banking")]
    assert programs("vmsilo", "status", "banking").returncode == 0
    assert programs("vmsilo", "status", "nothing").returncode == 1


def test_status_shows_what_passes_the_interfaces(programs: Programs, daemon: FakeDaemon) -> None:
    port = {
        **{"Interface": ("s", "wan"), "Tap": ("s", "banking-0"), "State": ("s", "up")},
        **{"Problem": ("s", ""), "Received": ("t", 1 << 40), "Sent": ("t", 12), "Denied": ("t", 3)},
    }
    broken = {**port, "Interface": ("s", "lan"), "State": ("s", "broken"), "Problem": ("s", "no\x1b[31m")}
    daemon.answers["GetNetwork"] = lambda _body: ("aa{sv}", ([port, broken],))
    shown = programs("vmsilo", "status", "banking").stdout.decode()
    counted = f"{1 << 40} bytes received, 12 sent, 3 packets denied"
    assert f"\nnetwork wan (banking-0): up, {counted}\n" in shown
    assert f"\nnetwork lan (banking-0): broken, {counted}; no" in shown
    assert "\x1b[31m" not in shown
    assert "dropped" not in shown
    told = json.loads(programs("vmsilo", "status", "--json", "banking").stdout)
    assert [each["Received"] for each in told["Network"]] == [1 << 40, 1 << 40]
    assert ("GetNetwork", ("banking",)) in daemon.calls


def test_status_shows_what_an_interface_is_on_and_what_its_rules_dropped(
    programs: Programs, daemon: FakeDaemon
) -> None:
    inner = {
        **{"Interface": ("s", "inner"), "Tap": ("s", "banking-1"), "State": ("s", "up")},
        **{"Type": ("s", "vm-switch"), "Network": ("s", "office"), "Received": ("t", 9), "Sent": ("t", 1)},
        "Dropped": ("a{st}", {"arp": 2, "mac": 40, "vlan": 0, "\x1b[2J": 1}),
    }
    daemon.answers["GetNetwork"] = lambda _body: ("aa{sv}", ([inner],))
    shown = programs("vmsilo", "status", "banking").stdout.decode()
    line = next(line for line in shown.splitlines() if line.startswith("network "))
    counted = "9 bytes received, 1 sent, dropped: 40 mac, 2 arp, 1 "
    assert line.startswith(f"network inner (banking-1, vm-switch office): up, {counted}")
    assert "\x1b" not in line
    assert "vlan" not in line
    (told,) = json.loads(programs("vmsilo", "status", "--json", "banking").stdout)["Network"]
    assert told["Dropped"]["mac"] == 40
    listed = programs("vmsilo", "network", "list", "banking").stdout.decode()
    assert "dropped: 40 mac, 2 arp" in listed


def test_other_programs_are_executed(programs: Programs, tmp_path: Path) -> None:
    library = tmp_path / "lib" / "bin"
    library.mkdir(parents=True)
    check = library / "vmsilo-check"
    check.write_text('#!/bin/sh\necho "checked $*"; exit 5\n')
    check.chmod(0o755)
    (tmp_path / "lib" / "VERSION").write_text("1.2.3\n")
    done = programs("vmsilo", "check", "--json")
    assert (done.returncode, done.stdout) == (5, b"checked --json\n")
    assert programs("vmsilo", "version").stdout == b"vmsilo 1.2.3\n"
    assert programs("vmsilo", "image", "list").returncode == 1
    assert programs("vmsilo", "frobnicate").returncode == 2
    assert programs("vmsilo").stdout.startswith(b"Usage: vmsilo ")


# vm-start-debug


class DebugVm:
    """What StartDebug hands over, kept as the VMM would."""

    def __init__(self, daemon: FakeDaemon) -> None:
        self._daemon = daemon
        self.fds: list[int] = []
        daemon.answers["StartDebug"] = self._start

    def _start(self, body: Any) -> tuple[str, tuple[Any, ...]]:
        _name, *descriptors = body
        self.fds = [d.to_raw_fd() for d in descriptors]
        os.write(self.fds[1], b"boot\x1b]0;owned\x07ing\n")
        return "s", ("vmsilo-banking-debug.service",)

    def end(self, state: str, result: str) -> None:
        self._daemon.vms = [vm("banking", state, LastResult=("s", result))]
        fds, self.fds = self.fds, []
        for fd in fds:
            os.close(fd)
        self._daemon.state_changed("banking", state, result)


def test_debug_console(programs: Programs, daemon: FakeDaemon) -> None:
    guest = DebugVm(daemon)
    with Terminal([*programs.argv("vm-start-debug"), "banking"], env=programs.env) as terminal:
        terminal.read_until(b"booting")
        assert os.isatty(guest.fds[0])
        assert os.get_terminal_size(guest.fds[0]).columns == 80
        terminal.wait_raw()
        terminal.type(b"root\r")
        assert os.read(guest.fds[0], 100) == b"root\n"
        guest.end("stopped", "success")
        assert terminal.wait() == 0
        assert b"VM 'banking' has ended (success)" in terminal.screen
        assert b"\x1b]" not in terminal.screen
        assert terminal.current_modes() == terminal.modes


def test_debug_console_of_a_vm_that_fails(programs: Programs, daemon: FakeDaemon) -> None:
    guest = DebugVm(daemon)
    with Terminal([*programs.argv("vm-start-debug"), "banking"], env=programs.env) as terminal:
        terminal.read_until(b"booting")
        daemon.vms = [vm("banking", "failed", LastResult=("s", "exit-code"))]
        daemon.state_changed("banking", "failed", "exit-code")
        assert terminal.wait() == 1
        assert b"VM 'banking' failed: exit-code" in terminal.screen
        assert terminal.current_modes() == terminal.modes
    guest.end("failed", "exit-code")


def test_debug_console_leaves_by_key(programs: Programs, daemon: FakeDaemon) -> None:
    guest = DebugVm(daemon)
    with Terminal([*programs.argv("vm-start-debug"), "banking"], env=programs.env) as terminal:
        terminal.read_until(b"booting")
        terminal.wait_raw()
        terminal.type(b"\x1d")
        assert terminal.wait() == 0
        assert [method for method, _body in daemon.calls] == ["StartDebug", "Kill"]
        assert terminal.current_modes() == terminal.modes
    guest.end("stopped", "")
