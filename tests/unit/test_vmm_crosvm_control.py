"""The crosvm control client against a real SEQPACKET socket."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from vmsilod.vmm.crosvm_control import MAX_REPLY, CrosvmMonitor
from vmsilod.vmm.errors import (
    MonitorClosed,
    MonitorGarbled,
    MonitorRefused,
    MonitorTimeout,
    MonitorUnreachable,
)
from vmsilod.vmm.monitor import AttachedUsb, DiskPlace, UsbMonitor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SILENT = object()


@contextmanager
def crosvm_that_answers(path: Path, *replies: Any) -> Iterator[list[Any]]:
    """One connection per reply: bytes as they are, None closes, SILENT keeps the connection open, anything
    else as JSON.
    """
    requests: list[Any] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for reply in replies:
                connection, _ = listener.accept()
                with connection:
                    packet, fds, _, _ = socket.recv_fds(connection, MAX_REPLY, 4)
                    requests.append(json.loads(packet))
                    for fd in fds:
                        requests.append(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115
                        os.close(fd)
                    if reply is SILENT:
                        connection.recv(1)
                    elif reply is not None:
                        connection.send(reply if isinstance(reply, bytes) else json.dumps(reply).encode())

        thread = threading.Thread(target=serve)
        thread.start()
        yield requests
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "monitor.sock"


@pytest.mark.parametrize(
    ("method", "request_"),
    [("power_button", "Powerbtn"), ("stop", "Exit"), ("suspend", "SuspendVcpus"), ("resume", "ResumeVcpus")],
)
def test_orders(path: Path, method: str, request_: str) -> None:
    with crosvm_that_answers(path, "Ok") as requests:
        getattr(CrosvmMonitor(path), method)()
    assert requests == [request_]


def test_balloon(path: Path) -> None:
    stats = {"total_memory": 1 << 30, "free_memory": None, "available_memory": -1, "swap_in": 3}
    answer = {"BalloonStats": {"stats": stats, "balloon_actual": 4096}}
    monitor = CrosvmMonitor(path)
    with crosvm_that_answers(path, "Ok", answer) as requests:
        monitor.set_balloon(8192)
        state = monitor.balloon_state()
    assert requests == [
        {"BalloonCommand": {"Adjust": {"num_bytes": 8192, "wait_for_success": False}}},
        {"BalloonCommand": "Stats"},
    ]
    assert (state.balloon, state.guest_total, state.guest_free, state.guest_available) == (
        4096,
        1 << 30,
        None,
        None,
    )


def test_disk_is_resized_by_its_place_in_the_argv(path: Path) -> None:
    with crosvm_that_answers(path, "Ok", {"Err": errno.EIO}) as requests:
        CrosvmMonitor(path).resize_disk(DiskPlace("data", 2), 1 << 30)
        with pytest.raises(MonitorRefused):
            CrosvmMonitor(path).resize_disk(DiskPlace("data", 2), 1 << 30)
    # As `crosvm disk resize 2 1073741824 SOCKET` sends it.
    assert requests[0] == {"DiskCommand": {"disk_index": 2, "command": {"Resize": {"new_size": 1 << 30}}}}


def usb(answer: object) -> dict[str, object]:
    return {"UsbResponse": answer}


def test_usb_devices_travel_as_descriptors(path: Path) -> None:
    slots = [{"port": 0, "vendor_id": 0, "product_id": 0}] * 16
    slots[2] = {"port": 3, "vendor_id": 0x951, "product_id": 0x1666}
    done = usb({"Ok": {"port": 3}})
    null = os.open("/dev/null", os.O_RDWR)
    with crosvm_that_answers(path, done, usb({"Devices": slots}), done, usb("NoSuchPort")) as requests:
        monitor: UsbMonitor = CrosvmMonitor(path)
        assert monitor.attach_usb(null, "1-5") == "3"
        assert monitor.list_usb() == [AttachedUsb("3", ids="0951:1666")]
        monitor.detach_usb("3")
        monitor.detach_usb("3")
    os.close(null)
    assert requests == [
        {"UsbCommand": {"AttachDevice": {"file": 0}}},
        "/dev/null",
        {"UsbCommand": {"ListDevice": {"ports": list(range(16))}}},
        {"UsbCommand": {"DetachDevice": {"port": 3}}},
        {"UsbCommand": {"DetachDevice": {"port": 3}}},
    ]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (usb("NoAvailablePort"), "is taken"),
        (usb("NoSuchDevice"), "cannot use the device"),
        ({"Err": errno.ENODEV}, "No such device"),
    ],
)
def test_a_usb_device_that_crosvm_does_not_take(path: Path, answer: object, text: str) -> None:
    with crosvm_that_answers(path, answer), pytest.raises(MonitorRefused, match=text):
        CrosvmMonitor(path).attach_usb(0, "1-5")


@pytest.mark.parametrize(
    "answer",
    ["Ok", usb({"Ok": {"port": -1}}), usb({"Ok": 3}), usb("\x1b[2J"), usb([]), usb({"Devices": {}})],
)
@pytest.mark.parametrize("method", ["attach_usb", "list_usb"])
def test_garbled_usb_answers_are_refused(path: Path, answer: object, method: str) -> None:
    arguments = (0, "1-5") if method == "attach_usb" else ()
    with crosvm_that_answers(path, answer), pytest.raises(MonitorGarbled) as caught:
        getattr(CrosvmMonitor(path), method)(*arguments)
    assert "\x1b" not in caught.value.message


def test_refusal_carries_its_errno_and_a_hint(path: Path) -> None:
    with (
        crosvm_that_answers(path, {"Err": errno.ENOTCONN}),
        pytest.raises(MonitorRefused, match="not connected") as caught,
    ):
        CrosvmMonitor(path).set_balloon(0)
    assert caught.value.reason == errno.ENOTCONN
    assert "balloon driver" in caught.value.hint


def test_refusal_in_words_is_escaped(path: Path) -> None:
    with (
        crosvm_that_answers(path, {"ErrString": "no \x1b[2J"}),
        pytest.raises(MonitorRefused, match=r"no \\x1b") as caught,
    ):
        CrosvmMonitor(path).suspend()
    assert "\x1b" not in caught.value.message


def test_no_reply_ends_with_a_timeout(path: Path) -> None:
    before = time.monotonic()
    with crosvm_that_answers(path, SILENT), pytest.raises(MonitorTimeout):
        CrosvmMonitor(path, timeout=0.1).power_button()
    assert time.monotonic() - before < 5


def test_end_of_the_vm_is_an_error_except_for_stop(path: Path) -> None:
    with crosvm_that_answers(path, None, None):
        with pytest.raises(MonitorClosed):
            CrosvmMonitor(path).power_button()
        CrosvmMonitor(path).stop()


@pytest.mark.parametrize(
    "reply", [b"{", b"\xff", {"SomethingElse": 1}, ["Ok"], b'"' + b"x" * MAX_REPLY + b'"']
)
def test_garbage_is_refused(path: Path, reply: Any) -> None:
    with crosvm_that_answers(path, reply), pytest.raises(MonitorGarbled):
        CrosvmMonitor(path).power_button()


@pytest.mark.parametrize(
    "reply",
    [
        {"BalloonStats": {}},
        {"BalloonStats": {"stats": {}, "balloon_actual": "x"}},
        {"BalloonStats": 1},
        "Ok",
    ],
)
def test_garbled_balloon_statistics_are_refused(path: Path, reply: Any) -> None:
    with crosvm_that_answers(path, reply), pytest.raises(MonitorGarbled):
        CrosvmMonitor(path).balloon_state()


def test_nobody_listens(path: Path) -> None:
    with pytest.raises(MonitorUnreachable):
        CrosvmMonitor(path).stop()
