"""vmsilo usb, network and memory, against a stand-in for vmsilod on a bus of the tests' own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jeepney")
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
        yield daemon


# vmsilo usb


def usb_device(
    port: str, ids: str = "0951:1666", **properties: tuple[str, Any]
) -> dict[str, tuple[str, Any]]:
    vendor, product = ids.split(":")
    return {
        "Port": ("s", port), "Vendor": ("s", vendor), "Product": ("s", product), "Serial": ("s", ""),
        "Title": ("s", "Kingston DataTraveler"), "Kinds": ("as", ["storage"]), "Speed": ("s", "480"),
        "Hub": ("b", False), "HostDrivers": ("as", ["usb-storage"]), "Vm": ("s", ""), "Rule": ("s", ""),
        "Obstacle": ("s", ""), **properties,
    }  # fmt: skip


def test_usb_devices_are_listed_and_harmless(programs: Programs, daemon: FakeDaemon) -> None:
    devices = [
        usb_device(
            "1-2", Serial=("s", "A1"), Obstacle=("s", "the host uses /dev/sda: it is mounted on /mnt")
        ),
        usb_device("1-3.1", Title=("s", "\x1b]0;owned\x07"), Vm=("s", "work"), HostDrivers=("as", [])),
    ]
    daemon.answers["ListUsb"] = lambda _body: ("aa{sv}", (devices,))
    done = programs("vmsilo", "usb", "list")
    assert done.returncode == 0
    _, stick, other = done.stdout.decode().splitlines()
    assert stick.split()[:3] == ["1-2", "0951:1666", "A1"]
    assert "mounted on /mnt" in stick
    assert "work" in other
    assert b"\x1b" not in done.stdout
    listed = json.loads(programs("vmsilo", "usb", "list", "--json").stdout)
    assert [device["Vm"] for device in listed] == ["", "work"]


def test_usb_orders_reach_the_daemon(programs: Programs, daemon: FakeDaemon) -> None:
    devices = [usb_device("1-2", Vm=("s", "banking"), Serial=("s", "Ab:1")), usb_device("1-3")]
    daemon.answers["ListUsb"] = lambda _body: ("aa{sv}", (devices,))
    for argv in (
        ("attach", "banking", "1-2"),
        ("detach", "banking", "1-2"),
        ("detach", "1-2"),
        ("detach", "0951:1666:Ab:1"),
        ("detach", "0951:1666"),
        ("release", "1-3"),
    ):
        done = programs("vmsilo", "usb", *argv)
        assert (done.returncode, done.stderr) == (0, b"")
    assert [call for call in daemon.calls if call[0] != "ListUsb"] == [
        ("AttachUsb", ("banking", "1-2")),
        ("DetachUsb", ("banking", "1-2")),
        ("DetachUsb", ("banking", "1-2")),
        ("DetachUsb", ("banking", "0951:1666:Ab:1")),
        ("DetachUsb", ("banking", "0951:1666")),
        ("ReleaseUsb", ("1-3",)),
    ]


@pytest.mark.parametrize(
    ("argv", "status", "text"),
    [
        (("attach", "banking"), 2, b"wrong number"),
        (("explode",), 2, b"unknown command"),
        (("attach", "bankin", "1-2"), 1, b"did you mean 'banking'"),
        (("detach", "1-3"), 1, b"no VM has"),
        (("attach", "banking", "--json", "1-2"), 2, b"takes no --json"),
    ],
)
def test_wrong_usb_orders_are_refused(
    programs: Programs, daemon: FakeDaemon, argv: tuple[str, ...], status: int, text: bytes
) -> None:
    daemon.answers["ListUsb"] = lambda _body: ("aa{sv}", ([usb_device("1-3")],))
    done = programs("vmsilo", "usb", *argv)
    assert done.returncode == status
    assert text in done.stderr


# vmsilo network


def test_interfaces_are_listed_and_harmless(programs: Programs, daemon: FakeDaemon) -> None:
    port = {
        **{"Interface": ("s", "wan"), "Tap": ("s", "banking-0"), "Mac": ("s", "02:00:00:00:00:01")},
        **{"State": ("s", "up"), "Problem": ("s", ""), "Received": ("t", 9), "Denied": ("t", 3)},
    }
    lan = {"Interface": ("s", "lan"), "State": ("s", "detached"), "Problem": ("s", "\x1b[31mno")}
    daemon.answers["GetNetwork"] = lambda _body: ("aa{sv}", ([port, lan],))
    done = programs("vmsilo", "network", "list", "banking")
    assert done.returncode == 0
    _, first, second = done.stdout.decode().splitlines()
    assert first.split() == ["wan", "banking-0", "02:00:00:00:00:01", "up", "9", "0", "3"]
    assert second.split()[:4] == ["lan", "-", "-", "detached"]
    assert b"\x1b" not in done.stdout
    listed = json.loads(programs("vmsilo", "network", "list", "--json", "banking").stdout)
    assert [each["State"] for each in listed] == ["up", "detached"]


def test_interface_orders_reach_the_daemon(programs: Programs, daemon: FakeDaemon) -> None:
    for command in ("attach", "detach"):
        done = programs("vmsilo", "network", command, "banking", "lan")
        assert (done.returncode, done.stderr) == (0, b"")
    assert daemon.calls == [("AttachInterface", ("banking", "lan")), ("DetachInterface", ("banking", "lan"))]


@pytest.mark.parametrize(
    ("argv", "status", "text"),
    [
        (("attach", "banking"), 2, b"wrong number"),
        (("list",), 2, b"wrong number"),
        (("explode", "banking"), 2, b"unknown command"),
        (("attach", "bankin", "lan"), 1, b"did you mean 'banking'"),
        (("detach", "--json", "banking", "lan"), 2, b"takes no --json"),
    ],
)
def test_wrong_interface_orders_are_refused(
    programs: Programs, daemon: FakeDaemon, argv: tuple[str, ...], status: int, text: bytes
) -> None:
    done = programs("vmsilo", "network", *argv)
    assert done.returncode == status
    assert text in done.stderr
    assert not daemon.calls


# vmsilo memory

SIZES = {"configured": 512, "maximum": 1024, "requested": 512, "actual": 512}


def test_memory_is_shown(programs: Programs, daemon: FakeDaemon) -> None:
    daemon.answers["GetMemory"] = lambda _body: ("a{su}", (SIZES,))
    done = programs("vmsilo", "memory", "banking")
    assert done.stdout.decode().splitlines()[0] == "memory      512 MiB"
    assert json.loads(programs("vmsilo", "memory", "--json", "banking").stdout) == SIZES


def test_memory_is_asked_for_until_the_guest_has_it(programs: Programs, daemon: FakeDaemon) -> None:
    answers = iter([768, 1024])
    asked = {**SIZES, "requested": 1024}
    daemon.answers["SetMemory"] = lambda _body: ("a{su}", (asked,))
    daemon.answers["GetMemory"] = lambda _body: ("a{su}", ({**asked, "actual": next(answers)},))
    done = programs("vmsilo", "memory", "banking", "1G")
    assert (done.returncode, done.stderr) == (0, b"")
    assert ("SetMemory", ("banking", 1024)) in daemon.calls
    assert "now         1024 MiB" in done.stdout.decode()


def test_memory_that_the_guest_keeps_is_told(programs: Programs, daemon: FakeDaemon) -> None:
    kept = {**SIZES, "actual": 640}
    for method in ("SetMemory", "GetMemory"):
        daemon.answers[method] = lambda _body: ("a{su}", (kept,))
    done = programs("vmsilo", "memory", "banking", "512M")
    assert done.returncode == 1
    assert "gave back only a part" in done.stdout.decode()


@pytest.mark.parametrize("size", ["", "0", "-1", "1.5G", "1T", "9" * 9, "\u0663", "x"])
def test_memory_size_that_is_none(programs: Programs, daemon: FakeDaemon, size: str) -> None:
    done = programs("vmsilo", "memory", "banking", size)
    assert done.returncode == 2
    assert daemon.calls == []
