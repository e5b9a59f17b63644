"""The client of cloud-hypervisor's API against a real HTTP server on a Unix socket."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from cloud_hypervisor_server import INFO, MIB, cloud_hypervisor_that_answers
from vmsilod.vmm.cloud_hypervisor_api import MAX_BODY, MAX_HEAD, CloudHypervisorMonitor
from vmsilod.vmm.errors import (
    MonitorClosed,
    MonitorGarbled,
    MonitorRefused,
    MonitorTimeout,
    MonitorUnreachable,
)
from vmsilod.vmm.monitor import BalloonState, DiskPlace, MemoryState

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "api.sock"


@pytest.mark.parametrize(
    ("call", "request_"),
    [
        (lambda m: m.power_button(), ("PUT", "vm.power-button", None)),
        (lambda m: m.stop(), ("PUT", "vmm.shutdown", None)),
        (lambda m: m.suspend(), ("PUT", "vm.pause", None)),
        (lambda m: m.resume(), ("PUT", "vm.resume", None)),
        (lambda m: m.set_balloon(64 * MIB), ("PUT", "vm.resize", {"desired_balloon": 64 * MIB})),
        (lambda m: m.resize_memory(2048 * MIB), ("PUT", "vm.resize", {"desired_ram": 2048 * MIB})),
        (
            lambda m: m.resize_disk(DiskPlace("data", 2), 64 * MIB),
            ("PUT", "vm.resize-disk", {"id": "disk-data", "desired_size": 64 * MIB}),
        ),
    ],
)
def test_each_order_is_one_request(path: Path, call: Any, request_: tuple[str, str, Any]) -> None:
    with cloud_hypervisor_that_answers(path, {request_[1]: (204, b"")}) as server:
        assert call(CloudHypervisorMonitor(path)) is None
    assert server.requests == [request_]


def test_memory_that_the_guest_has_taken_in_part(path: Path) -> None:
    with cloud_hypervisor_that_answers(path, {"vm.info": (200, json.dumps(INFO).encode())}):
        state = CloudHypervisorMonitor(path).memory_state()
        balloon = CloudHypervisorMonitor(path).balloon_state()
    assert state == MemoryState(requested=1536 * MIB, actual=1280 * MIB, maximum=2048 * MIB)
    assert balloon == BalloonState(balloon=0)


def test_balloon_that_the_guest_has_not_filled_yet(path: Path) -> None:
    config = {"memory": {"size": 1024 * MIB, "hotplug_size": None}, "balloon": {"size": 256 * MIB}}
    info = json.dumps({"config": config, "memory_actual_size": 900 * MIB}).encode()
    with cloud_hypervisor_that_answers(path, {"vm.info": (200, info)}):
        assert CloudHypervisorMonitor(path).balloon_state() == BalloonState(balloon=124 * MIB)


def test_refusal_says_why(path: Path) -> None:
    errors = ["Error from API", "The VM could not be resized", "Cannot \x1b[31mshrink"]
    with (
        cloud_hypervisor_that_answers(path, {"vm.resize": (500, json.dumps(errors).encode())}),
        pytest.raises(MonitorRefused, match="could not be resized") as caught,
    ):
        CloudHypervisorMonitor(path).resize_memory(1)
    assert caught.value.reason == 500
    assert "\x1b" not in str(caught.value)


def test_stop_that_is_faster_than_its_answer(path: Path) -> None:
    with cloud_hypervisor_that_answers(path, {"vmm.shutdown": b""}):
        CloudHypervisorMonitor(path).stop()


def test_end_before_the_answer(path: Path) -> None:
    with cloud_hypervisor_that_answers(path, {"vm.pause": b""}), pytest.raises(MonitorClosed):
        CloudHypervisorMonitor(path).suspend()


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200\r\nx: " + bytes(2 * MAX_HEAD),
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY + 1),
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{}}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b'HTTP/1.1 200 OK\r\nContent-Length: 26\r\n\r\n{"config": {"memory": {}}} ',
        b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100000,
    ],
)
def test_answer_that_is_none(path: Path, answer: bytes) -> None:
    with cloud_hypervisor_that_answers(path, {"vm.info": answer}), pytest.raises(MonitorGarbled):
        CloudHypervisorMonitor(path).memory_state()


def test_nobody_listens(path: Path) -> None:
    with pytest.raises(MonitorUnreachable):
        CloudHypervisorMonitor(path).power_button()


@pytest.mark.parametrize("drip", [b"", b"HTTP/1.1 200 OK\r\nx: "])
def test_answer_that_never_ends_does_not_hold_the_worker(path: Path, drip: bytes) -> None:
    """A byte now and then does not push the deadline away."""
    over = threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.sendall(drip)
                while not over.wait(0.02):
                    if drip:
                        connection.send(b"x")

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(MonitorTimeout):
            CloudHypervisorMonitor(path, timeout=0.3).power_button()
        over.set()
        thread.join()
