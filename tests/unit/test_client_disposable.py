"""vm-run --disposable and --here, against a stand-in for vmsilod and a command socket."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client_host import command_socket, run_commands

pytest.importorskip("jeepney")
import jeepney
from client_host_bus import FakeDaemon, Programs, fake_daemon, message_bus


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
        # The stand-in's command socket is that of the VM "banking".
        daemon.answers["CreateDisposable"] = lambda _body: ("sas", ("banking", ["without x\x1b[2J"]))
        daemon.answers["CreateDisposableHere"] = lambda _body: ("sas", ("banking", []))
        yield daemon


def test_a_command_in_a_disposable(programs: Programs, daemon: FakeDaemon, tmp_path: Path) -> None:
    with command_socket(tmp_path, run_commands):
        done = programs(
            "vm-run", "--disposable", "--name", "box", "work", "--", "sh", "-c", "echo in; exit 7"
        )
    assert (done.returncode, done.stdout) == (7, b"in\n")
    assert done.stderr == b"vm-run: banking: without x [2J\n"
    assert daemon.calls == [("CreateDisposable", ("work", {"name": ("s", "box")}))]


def test_the_connection_is_held_until_the_command_has_ended(
    programs: Programs, daemon: FakeDaemon, bus: str, tmp_path: Path
) -> None:
    """By that vmsilod knows how long the disposable is wanted."""
    senders: list[str] = []

    def create(_body: Any) -> tuple[str, tuple[Any, ...]]:
        names = list_names(bus)
        senders.extend(name for name in names if name.startswith(":"))
        return "sas", ("banking", [])

    daemon.answers["CreateDisposable"] = create
    with command_socket(tmp_path, run_commands):
        script = f"touch {tmp_path}/runs; while [ ! -e {tmp_path}/end ]; do sleep 0.05; done"
        argv = [*programs.argv("vm-run"), "--disposable", "work", "sh", "-c", script]
        client = subprocess.Popen(argv, env={**os.environ, **programs.env})
        while not (tmp_path / "runs").exists():
            time.sleep(0.05)
        during = set(list_names(bus))
        (tmp_path / "end").touch()
        assert client.wait(20) == 0
    after = set(list_names(bus))
    assert len((during & set(senders)) - after) == 1


def list_names(address: str) -> list[str]:
    from jeepney.io.blocking import open_dbus_connection

    with open_dbus_connection(address) as connection:
        reply = connection.send_and_get_reply(jeepney.message_bus.ListNames(), timeout=10)
    names: list[str] = reply.body[0]
    return [name for name in names if name != connection.unique_name]


def test_here_hands_over_the_directory_and_its_path(
    programs: Programs, daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def create(body: Any) -> tuple[str, tuple[Any, ...]]:
        seen.append(str(Path(f"/proc/self/fd/{body[1].fileno()}").readlink()))
        return "sas", ("banking", [])

    daemon.answers["CreateDisposableHere"] = create
    folder = tmp_path / "a project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with command_socket(tmp_path, run_commands):
        done = programs("vm-run", "--here", "--ro", "pwd")
    assert (done.returncode, done.stdout.decode()) == (0, f"{folder}\n")
    ((_method, (template, _fd, options)),) = daemon.calls
    assert seen == [str(folder)]
    assert template == ""
    assert options == {
        "path": ("s", str(folder)),
        "network": ("b", False),
        "ro": ("b", True),
        "home": ("b", False),
    }


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (("--ro", "work", "x"), "--ro is for --here"),
        (("--here", "--disposable", "x"), "leave out --disposable"),
        (("--name", "n", "work", "x"), "--name is for --disposable"),
        (("--disposable", "--detach", "work", "x"), "cannot be left alone"),
        (("--disposable", "--no-start", "work", "x"), "never runs before"),
        (("--disposable", "work"), "no command given"),
        (("--here",), "no command given"),
        (("--here", "--template", "No", "x"), "not a VM name"),
    ],
)
def test_wrong_command_lines(
    programs: Programs, daemon: FakeDaemon, arguments: tuple[str, ...], fact: str
) -> None:
    done = programs("vm-run", *arguments)
    assert done.returncode == 125
    assert fact in done.stderr.decode()
    assert daemon.calls == []


def test_a_refusal_is_one_line_and_a_hint(programs: Programs, daemon: FakeDaemon) -> None:
    error = ("org.vmsilo1.Error.Busy", "there are 16 disposables already\nend one of them")
    daemon.answers["CreateDisposable"] = lambda _body: (error[0], (error[1],))
    done = programs("vm-run", "--disposable", "work", "x")
    assert done.returncode == 125
    assert done.stderr == b"vm-run: there are 16 disposables already\nhint: end one of them\n"
