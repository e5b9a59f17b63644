"""vmsilod's half of the consoles: the terminal pair, the sockets, and what a launcher passes."""

from __future__ import annotations

import os
import pwd
import socket
import stat
import termios
from typing import TYPE_CHECKING, Any

import pytest
from vmsilod import consoles, loop
from vmsilod.config.model import VmConfig
from vmsilod.errors import Failed
from vmsilod.registry import Registry, Vm
from vmsilod.resources.record import Record

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path


def test_terminal_changes_no_byte_and_echoes_nothing() -> None:
    master, slave = consoles.open_terminal()
    try:
        settings = termios.tcgetattr(slave)
        settings[1] |= termios.OPOST  # as QEMU does
        termios.tcsetattr(slave, termios.TCSANOW, settings)
        os.write(slave, b"one\r\ntwo\x03\n")
        assert os.read(master, 100) == b"one\r\ntwo\x03\n"
        os.write(master, b"typed\n")
        assert os.read(slave, 100) == b"typed\n"
        assert not termios.tcgetattr(slave)[3] & termios.ECHO
    finally:
        os.close(master)
        os.close(slave)


def test_the_stream_is_told_from_listeners_and_pipes() -> None:
    ours, its = socket.socketpair()
    with ours, its, socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()
        reading, writing = os.pipe()
        try:
            fds = [listener.fileno(), its.fileno(), writing]
            assert consoles.split_passed(fds) == ([listener.fileno(), writing], its.fileno())
        finally:
            os.close(reading)
            os.close(writing)


def test_what_runs_belongs_to_whom_it_was_started_for() -> None:
    def config(user: str) -> VmConfig:
        sizes = {"memory": 512, "cpus": 1, "start_timeout": 9, "stop_timeout": 9}
        return VmConfig.model_validate(
            {"name": "banking", "user": user, "color": "red", "image": "default", **sizes}
        )

    vm = Vm("banking", config=config("root"))
    assert consoles.owner_of(vm) == 0
    vm.record = Record("banking", "unit", "g1", config=config("daemon").to_json())
    assert consoles.owner_of(vm) == pwd.getpwnam("daemon").pw_uid
    vm.record = None
    assert consoles.owner_of(vm) == 0
    vm.config = None
    assert consoles.owner_of(vm) is None


def test_leftover_sockets_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = consoles.bind_fresh(tmp_path / "banking-console", os.getuid())
    gone = consoles.bind_fresh(tmp_path / "old-console", os.getuid())
    (tmp_path / "file-console").write_text("not ours")
    consoles.remove_sockets(tmp_path, frozenset({"banking"}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["banking-console", "file-console"]
    os.close(kept)
    os.close(gone)


def test_a_bound_console_is_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "banking-console"
    for _ in range(2):  # the second takes the place of the first
        listener = consoles.bind_fresh(path, os.getuid())
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        os.close(listener)


def test_a_place_that_cannot_be_taken_costs_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "banking-console"
    path.mkdir()
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a Path would open one more
    with pytest.raises(Failed, match="cannot make"):
        consoles.bind_fresh(path, os.getuid())
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - as above
    assert list(tmp_path.iterdir()) == [path]


def test_two_wishes_at_once_make_one_agreement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun = []

    def spawn(coroutine: Coroutine[Any, Any, None]) -> None:
        begun.append(coroutine)
        coroutine.close()

    monkeypatch.setattr(loop, "spawn", spawn)
    ours = consoles.Consoles(Registry(), str(tmp_path), tmp_path)
    ours.agree_soon()
    ours.agree_soon()
    assert len(begun) == 1
