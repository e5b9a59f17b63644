"""vmsilo disk, as a program against a daemon of the test's own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("jeepney")
from client_host_bus import FakeDaemon, Programs, fake_daemon, message_bus

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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


def disk(name: str, **more: tuple[str, Any]) -> dict[str, tuple[str, Any]]:
    return {
        "Vm": ("s", "banking"),
        "Id": ("s", name),
        "Path": ("s", "/srv/a\x1b[31mb.img"),
        "State": ("s", "idle"),
        "Size": ("t", 20 << 30),
        "Allocated": ("t", 3 << 20),
        "Format": ("s", "raw"),
        "Readonly": ("b", False),
        "Mount": ("s", "/data"),
        **more,
    }


def test_disks_are_listed_and_harmless(programs: Programs, daemon: FakeDaemon) -> None:
    read_only = disk("backup", Readonly=("b", True), Mount=("s", ""))
    daemon.answers["ListDisks"] = lambda _body: ("aa{sv}", ([disk("data"), read_only],))
    done = programs("vmsilo", "disk", "list")
    lines = done.stdout.decode().splitlines()
    assert lines[0].split() == ["VM", "DISK", "SIZE", "ON", "HOST", "STATE", "MOUNT", "FILE"]
    assert lines[1].split()[:6] == ["banking", "data", "20G", "3M", "idle", "/data"]
    assert "read-only" in lines[2]
    assert b"\x1b" not in done.stdout
    listed = json.loads(programs("vmsilo", "disk", "list", "--json", "banking").stdout)
    assert [each["Id"] for each in listed] == ["data", "backup"]
    assert [call for call in daemon.calls if call[0] == "ListDisks"] == [
        ("ListDisks", ("",)),
        ("ListDisks", ("banking",)),
    ]


def test_orders_reach_the_daemon(programs: Programs, daemon: FakeDaemon) -> None:
    daemon.answers["GrowDisk"] = daemon.answers["RemoveDisk"] = lambda _body: ("", ())
    for argv in (("grow", "banking", "data", "20G"), ("remove", "gone", "persist")):
        done = programs("vmsilo", "disk", *argv)
        assert (done.returncode, done.stderr) == (0, b"")
    assert [call for call in daemon.calls if call[0] in ("GrowDisk", "RemoveDisk")] == [
        ("GrowDisk", ("banking", "data", 20 << 30)),
        ("RemoveDisk", ("gone", "persist")),
    ]


@pytest.mark.parametrize(
    ("argv", "status", "text"),
    [
        (("grow", "banking", "data"), 2, b"wrong number"),
        (("grow", "banking", "data", "-1G"), 2, b"unknown option"),
        (("grow", "banking", "data", "0G"), 2, b"not a size"),
        (("grow", "banking", "data", "20"), 2, b"not a size"),
        (("grow", "bankin", "data", "20G"), 1, b"did you mean 'banking'"),
        (("shrink",), 2, b"unknown command"),
        (("remove", "banking", "--json", "persist"), 2, b"takes no --json"),
    ],
)
def test_wrong_orders_are_refused(
    programs: Programs, daemon: FakeDaemon, argv: tuple[str, ...], status: int, text: bytes
) -> None:
    done = programs("vmsilo", "disk", *argv)
    assert done.returncode == status
    assert text in done.stderr
    assert not [call for call in daemon.calls if call[0] in ("GrowDisk", "RemoveDisk")]
