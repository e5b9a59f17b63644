"""The QMP client against a real stream socket."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from vmsilod.vmm.errors import (
    MonitorClosed,
    MonitorGarbled,
    MonitorRefused,
    MonitorTimeout,
    MonitorUnreachable,
)
from vmsilod.vmm.monitor import DiskPlace, MemoryState
from vmsilod.vmm.qmp import HOTPLUG_ID, MAX_LINE, QemuMonitor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 0}}, "capabilities": ["oob"]}}
EVENT = {"event": "RTC_CHANGE", "data": {"offset": 0}, "timestamp": {"seconds": 1, "microseconds": 2}}
OK: dict[str, Any] = {"return": {}}


@contextmanager
def qemu_that_answers(
    path: Path, answers: dict[str, Any], *, greeting: bytes | None = None
) -> Iterator[list[Any]]:
    """One connection. A list of messages per command; bytes are sent as they are; None closes; no entry:
    silence.
    """
    requests: list[Any] = []
    answers = {"qmp_capabilities": [OK]} | answers
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            # The client may go away without reading all.
            with connection, suppress(BrokenPipeError, ConnectionResetError):
                answer_requests(connection)

        def answer_requests(connection: socket.socket) -> None:
            connection.sendall(greeting if greeting is not None else json.dumps(GREETING).encode() + b"\r\n")
            with connection.makefile("rb") as lines:
                while line := lines.readline():
                    requests.append(json.loads(line))
                    answer = answers.get(requests[-1]["execute"], [])
                    if answer is None:
                        return
                    for message in answer:
                        data = (
                            message if isinstance(message, bytes) else json.dumps(message).encode() + b"\r\n"
                        )
                        connection.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield requests
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "monitor.sock"


@pytest.mark.parametrize(
    ("method", "command"),
    [("power_button", "system_powerdown"), ("stop", "quit"), ("suspend", "stop"), ("resume", "cont")],
)
def test_orders(path: Path, method: str, command: str) -> None:
    with qemu_that_answers(path, {command: [EVENT, OK]}) as requests:
        getattr(QemuMonitor(path), method)()
    assert requests == [{"execute": "qmp_capabilities"}, {"execute": command}]


def test_disk_is_resized_by_its_name(path: Path) -> None:
    with qemu_that_answers(path, {"block_resize": [EVENT, OK]}) as requests:
        QemuMonitor(path).resize_disk(DiskPlace("data", 2), 1 << 30)
    arguments = {"node-name": "disk-data", "size": 1 << 30}
    assert requests[1] == {"execute": "block_resize", "arguments": arguments}


def test_status(path: Path) -> None:
    with qemu_that_answers(path, {"query-status": [{"return": {"status": "paused", "running": False}}]}):
        assert QemuMonitor(path).status() == "paused"


def test_balloon_takes_what_is_left_to_the_guest(path: Path) -> None:
    sizes = {"query-memory-size-summary": [{"return": {"base-memory": 1 << 30}}], "balloon": [OK]}
    with qemu_that_answers(path, sizes) as requests:
        QemuMonitor(path).set_balloon(1 << 28)
    assert requests[-1] == {"execute": "balloon", "arguments": {"value": (1 << 30) - (1 << 28)}}


def test_balloon_state(path: Path) -> None:
    sizes = {
        "query-memory-size-summary": [{"return": {"base-memory": 1000}}],
        "query-balloon": [{"return": {"actual": 400}}],
    }
    with qemu_that_answers(path, sizes):
        assert QemuMonitor(path).balloon_state().balloon == 600


HOTPLUG = {"id": "hotplug0", "requested-size": 600, "size": 500, "max-size": 1000, "block-size": 2}


def test_memory_is_what_was_there_and_what_is_plugged_in(path: Path) -> None:
    answers = {
        "query-memory-size-summary": [{"return": {"base-memory": 1000}}],
        "query-memory-devices": [{"return": [{"type": "dimm"}, {"type": "virtio-mem", "data": HOTPLUG}]}],
    }
    with qemu_that_answers(path, answers):
        state = QemuMonitor(path).memory_state()
    assert state == MemoryState(requested=1600, actual=1500, maximum=2000)


def test_memory_is_asked_for_beyond_what_was_there(path: Path) -> None:
    answers = {"query-memory-size-summary": [{"return": {"base-memory": 1000}}], "qom-set": [OK]}
    with qemu_that_answers(path, answers) as requests:
        QemuMonitor(path).resize_memory(1600)
    arguments = {"path": f"/machine/peripheral/{HOTPLUG_ID}", "property": "requested-size", "value": 600}
    assert requests[-1] == {"execute": "qom-set", "arguments": arguments}


@pytest.mark.parametrize("devices", [[], [{"type": "virtio-mem"}], {}, [{"type": "virtio-mem", "data": {}}]])
def test_memory_of_a_machine_without_hotplug(path: Path, devices: object) -> None:
    answers = {
        "query-memory-size-summary": [{"return": {"base-memory": 1000}}],
        "query-memory-devices": [{"return": devices}],
    }
    with qemu_that_answers(path, answers), pytest.raises(MonitorGarbled):
        QemuMonitor(path).memory_state()


def test_refusal_carries_its_class(path: Path) -> None:
    error = {"error": {"class": "DeviceNotActive", "desc": "No balloon \x1b device"}}
    with qemu_that_answers(path, {"stop": [error]}), pytest.raises(MonitorRefused) as caught:
        QemuMonitor(path).suspend()
    assert caught.value.reason == "DeviceNotActive"
    assert "\x1b" not in caught.value.message


def test_no_reply_ends_with_a_timeout(path: Path) -> None:
    with qemu_that_answers(path, {}), pytest.raises(MonitorTimeout):
        QemuMonitor(path, timeout=0.1).suspend()


def test_events_without_end_do_not_outlast_the_request(path: Path) -> None:
    with qemu_that_answers(path, {"stop": [EVENT] * 2000}), pytest.raises(MonitorGarbled):
        QemuMonitor(path).suspend()


def test_busy_monitor_is_a_timeout_with_a_hint(path: Path) -> None:
    with qemu_that_answers(path, {}, greeting=b""), pytest.raises(MonitorTimeout) as caught:
        QemuMonitor(path, timeout=0.1).suspend()
    assert "another client" in caught.value.hint


def test_end_of_the_vm_is_an_error_except_for_stop(path: Path) -> None:
    with qemu_that_answers(path, {"stop": None}), pytest.raises(MonitorClosed):
        QemuMonitor(path).suspend()
    path.unlink()
    with qemu_that_answers(path, {"quit": None}):
        QemuMonitor(path).stop()


@pytest.mark.parametrize(
    "greeting",
    [b"{}\n", b"[1]\n", b"not JSON\n", b"\xff\n", b"x" * (MAX_LINE + 100000), b"[" * 100000 + b"\n"],
)
def test_garbage_is_refused(path: Path, greeting: bytes) -> None:
    with qemu_that_answers(path, {}, greeting=greeting), pytest.raises(MonitorGarbled):
        QemuMonitor(path).suspend()


def test_answer_of_an_unknown_kind_is_refused(path: Path) -> None:
    with qemu_that_answers(path, {"stop": [{"id": 1}]}), pytest.raises(MonitorGarbled):
        QemuMonitor(path).suspend()


def test_nobody_listens(path: Path) -> None:
    with pytest.raises(MonitorUnreachable):
        QemuMonitor(path).stop()
