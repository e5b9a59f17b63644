"""The control socket's gate: who is a launcher, and what a launcher may ask."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from gi.repository import GLib
from vmsilod.control import ControlServer, Peer, Prepared, find_unit, parse_operation
from vmsilod.errors import BadRequest

if TYPE_CHECKING:
    from pathlib import Path

FLOOD = """
import socket, sys
while True:
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.connect(sys.argv[1])
    s.close()
"""
PEER = Peer(1, 61234, 61234, "banking", "vmsilo-banking-vm.service")


@pytest.mark.parametrize(
    ("cgroup", "found"),
    [
        ("0::/vmsilo.slice/vmsilo-banking-vm.service\n", ("banking", "vmsilo-banking-vm.service")),
        ("0::/vmsilo.slice/vmsilo-a-b-debug.service/sub\n", ("a-b", "vmsilo-a-b-debug.service")),
        (
            "5:devices:/\n1:name=systemd:/vmsilo.slice/vmsilo-x-vm.service\n0::/\n",
            ("x", "vmsilo-x-vm.service"),
        ),
        # A controller's hierarchy, where an unprivileged process may have been put anywhere, does not count.
        ("5:devices:/vmsilo-banking-vm.service\n0::/user.slice\n", None),
        ("0::/user.slice/user-1000.slice/session-2.scope\n", None),
        ("0::/vmsilo.slice/vmsilo-banking-vsock.service\n", None),
        ("0::/vmsilo.slice/vmsilo-a-b-forward.service\n", ("a-b", "vmsilo-a-b-forward.service")),
        ("0::/vmsilo.slice/vmsilo-Banking-vm.service\n", None),
        ("0::/x-vmsilo-banking-vm.service\n", None),
    ],
)
def test_a_process_is_known_by_its_unit(tmp_path: Path, cgroup: str, found: tuple[str, str] | None) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cgroup").write_text(cgroup)
    assert find_unit(7, tmp_path) == found


def test_a_process_that_is_gone_is_nobody(tmp_path: Path) -> None:
    assert find_unit(7, tmp_path) is None
    assert find_unit(os.getpid()) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"op": "prepare"}',
        b'{"op": "prepare", "name": "work"}',
        b'{"op": "release", "name": "banking"}',
        b'{"op": ["prepare"], "name": "banking"}',
        b'{"op": "forward", "name": "banking", "listening": false}',
    ],
)
def test_everything_but_its_own_request_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_operation(data, PEER)


def test_its_own_request_is_taken() -> None:
    assert parse_operation(b'{"op": "prepare", "name": "banking"}', PEER) == "prepare"
    assert parse_operation(b'{"op": "stop", "name": "banking"}', PEER) == "stop"


def test_a_forwarder_may_ask_for_its_ports_alone() -> None:
    forwarder = dataclasses.replace(PEER, unit="vmsilo-banking-forward.service")
    ask = b'{"op": "forward", "name": "banking", "listening": %s}'
    assert parse_operation(ask % b"false", forwarder) == "forward"
    assert parse_operation(ask % b"true", forwarder) == "forward again"
    for operation in (b"prepare", b"stop", b"forward again"):
        with pytest.raises(BadRequest):
            parse_operation(b'{"op": "%s", "name": "banking"}' % operation, forwarder)


class Nobody:
    """No launcher gets this far in these tests."""

    async def prepare(self, peer: Peer, fds: list[int]) -> Prepared:
        raise AssertionError

    async def shut_down(self, peer: Peer) -> dict[str, Any]:
        raise AssertionError

    async def forward(self, peer: Peer, *, listening: bool) -> tuple[dict[str, Any], list[int]]:
        raise AssertionError

    async def share(
        self, peer: Peer, fds: list[int], *, listening: bool
    ) -> tuple[dict[str, Any], list[int]]:
        raise AssertionError


def test_a_flood_of_strangers_leaves_the_loop_its_turns(tmp_path: Path) -> None:
    """Strangers connect without end from another process; a timer of the loop still gets its turns."""
    path = str(tmp_path / "control.sock")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(512)
    server = ControlServer(listener, Nobody())
    main_loop = GLib.MainLoop()
    ticks: list[float] = []

    def tick() -> bool:
        ticks.append(time.monotonic())
        return True

    with subprocess.Popen([sys.executable, "-c", FLOOD, path]) as flood:
        try:
            GLib.timeout_add(10, tick)
            GLib.timeout_add(1500, main_loop.quit)
            main_loop.run()
        finally:
            flood.kill()
    server.close()
    assert len(ticks) > 20
