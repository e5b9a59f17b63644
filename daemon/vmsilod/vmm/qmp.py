"""Control client of a running QEMU: QMP over its stream socket.

Used by the lifecycle through monitor.MonitorClient, in a worker thread. One connection per request, because
QEMU's monitor serves one client at a time and lets the next wait without a word. Lines have a bound, and all
of one request shares one deadline.
"""

from __future__ import annotations

import json
import socket
import time
from typing import TYPE_CHECKING, Any

from vmsilod.vmm import qmp_net, qmp_usb
from vmsilod.vmm.disks import disk_id
from vmsilod.vmm.errors import (
    MonitorClosed,
    MonitorError,
    MonitorGarbled,
    MonitorRefused,
    MonitorTimeout,
    MonitorUnreachable,
)
from vmsilod.vmm.monitor import DEFAULT_TIMEOUT, AttachedUsb, BalloonState, DiskPlace, MemoryState
from vmsilod.vmm.net import check_device

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vmsilod.vmm.launch import NetDevice

HOTPLUG_ID = "hotplug0"
"""The virtio-mem device, named so by the driver."""
MAX_LINE = 256 * 1024
MAX_LINES = 1000
"""Events that may come before one answer."""


class QemuMonitor:
    returns_usb_to_host = True

    def __init__(self, path: Path, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._path = path
        self._timeout = timeout

    def power_button(self) -> None:
        self.execute("system_powerdown")

    def stop(self) -> None:
        # QEMU may be gone before its answer is read, which is what was asked for.
        try:
            self.execute("quit")
        except MonitorClosed:
            return

    def suspend(self) -> None:
        self.execute("stop")

    def resume(self) -> None:
        self.execute("cont")

    def status(self) -> str:
        """QEMU's RunState: running, paused, shutdown, guest-panicked, ..."""
        reply = self.execute("query-status")
        status = reply.get("status") if isinstance(reply, dict) else None
        if not isinstance(status, str):
            raise MonitorGarbled("QEMU did not say in which state it is")
        return status

    def set_balloon(self, size: int) -> None:
        # QEMU's balloon command takes what is left to the guest, not the balloon's size.
        with _Session(self._path, self._timeout) as session:
            left = max(_memory_size(session) - size, 1)
            session.execute("balloon", {"value": left})

    def balloon_state(self) -> BalloonState:
        with _Session(self._path, self._timeout) as session:
            actual = _read_size(session.execute("query-balloon"), "actual")
            if actual is None:
                raise MonitorGarbled("QEMU did not say how much memory the guest has")
            return BalloonState(balloon=max(_memory_size(session) - actual, 0))

    def attach_usb(self, fd: int, label: str) -> str:
        with _Session(self._path, self._timeout) as session:
            return qmp_usb.attach(session, fd, label)

    def detach_usb(self, handle: str) -> None:
        with _Session(self._path, self._timeout) as session:
            qmp_usb.detach(session, handle)

    def list_usb(self) -> list[AttachedUsb]:
        with _Session(self._path, self._timeout) as session:
            return qmp_usb.list_attached(session)

    def attach_net(self, net: NetDevice) -> None:
        check_device(net)
        with _Session(self._path, self._timeout) as session:
            qmp_net.attach(session, net)

    def detach_net(self, device: str) -> None:
        with _Session(self._path, self._timeout) as session:
            qmp_net.detach(session, device)

    def resize_disk(self, place: DiskPlace, size: int) -> None:
        self.execute("block_resize", {"node-name": disk_id(place.serial), "size": size})

    def resize_memory(self, size: int) -> None:
        with _Session(self._path, self._timeout) as session:
            wanted = max(size - _memory_size(session), 0)
            path = f"/machine/peripheral/{HOTPLUG_ID}"
            session.execute("qom-set", {"path": path, "property": "requested-size", "value": wanted})

    def memory_state(self) -> MemoryState:
        with _Session(self._path, self._timeout) as session:
            base = _memory_size(session)
            hotplug = _find_hotplug(session.execute("query-memory-devices"))
        requested, actual, maximum = (
            _read_size(hotplug, key) for key in ("requested-size", "size", "max-size")
        )
        if requested is None or actual is None or maximum is None:
            raise MonitorGarbled("QEMU did not say how much memory is plugged in")
        return MemoryState(requested=base + requested, actual=base + actual, maximum=base + maximum)

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """What the command returned; QEMU's error is raised as MonitorRefused."""
        with _Session(self._path, self._timeout) as session:
            return session.execute(command, arguments)


class _Session:
    """One connection after its handshake; lives for one request of QemuMonitor."""

    def __init__(self, path: Path, timeout: float) -> None:
        self._path = path
        self._deadline = time.monotonic() + timeout
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._pending = b""
        self._deleted: set[str] = set()

    def __enter__(self) -> _Session:
        try:
            self._connect()
            if "QMP" not in self._read_message("its greeting"):
                raise MonitorGarbled(f"what listens on {self._path} does not speak QMP")
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def execute(self, command: str, arguments: dict[str, Any] | None = None, fds: Sequence[int] = ()) -> Any:
        """`fds` travel with the command and stay the caller's."""
        request = {"execute": command} | ({"arguments": arguments} if arguments else {})
        self._send(command, json.dumps(request).encode() + b"\n", fds)
        for _ in range(MAX_LINES):
            message = self._read_message(command)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise _refusal(command, message["error"])
            if "event" not in message:
                raise MonitorGarbled(f"QEMU sent neither an answer to {command} nor an event")
            self._note(message)
        raise MonitorGarbled(f"QEMU sent {MAX_LINES} events instead of an answer to {command}")

    def await_deleted(self, device: str) -> None:
        """Until QEMU says that the device of this id is gone; it may have said so before its last answer."""
        for _ in range(MAX_LINES):
            if device in self._deleted:
                return
            self._note(self._read_message(f"the removal of {device}"))
        raise MonitorGarbled(f"QEMU sent {MAX_LINES} events, and not that {device} is gone")

    def _note(self, message: dict[str, Any]) -> None:
        data = message.get("data")
        if message.get("event") == "DEVICE_DELETED" and isinstance(data, dict):
            self._deleted.add(str(data.get("device", "")))

    def _connect(self) -> None:
        self._socket.settimeout(self._left("connect"))
        try:
            self._socket.connect(str(self._path))
        except OSError as exc:
            raise MonitorUnreachable(f"no QEMU listens on {self._path}: {exc.strerror or exc}") from exc

    def _send(self, command: str, line: bytes, fds: Sequence[int]) -> None:
        self._socket.settimeout(self._left(command))
        try:
            sent = socket.send_fds(self._socket, [line], fds) if fds else 0
            self._socket.sendall(line[sent:])
        except OSError as exc:
            raise _translate(command, exc) from exc

    def _read_message(self, what: str) -> dict[str, Any]:
        line = self._read_line(what)
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise MonitorGarbled("QEMU sent a line that is not JSON") from exc
        if not isinstance(message, dict):
            raise MonitorGarbled("QEMU sent a line that is not a JSON object")
        return message

    def _read_line(self, what: str) -> bytes:
        while b"\n" not in self._pending:
            if len(self._pending) > MAX_LINE:
                raise MonitorGarbled(f"QEMU sent a line of more than {MAX_LINE} bytes")
            self._socket.settimeout(self._left(what))
            try:
                received = self._socket.recv(65536)
            except OSError as exc:
                raise _translate(what, exc) from exc
            if not received:
                raise MonitorClosed(f"QEMU ended before {what} was answered")
            self._pending += received
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _left(self, what: str) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise _timeout(what)
        return left


def _timeout(what: str) -> MonitorTimeout:
    return MonitorTimeout(
        f"QEMU did not answer in time ({what})", "another client may be holding its monitor"
    )


def _translate(what: str, exc: OSError) -> MonitorError:
    if isinstance(exc, TimeoutError):
        return _timeout(what)
    if isinstance(exc, (BrokenPipeError, ConnectionResetError)):
        return MonitorClosed(f"QEMU ended before {what} was answered")
    return MonitorError(f"the request {what} to QEMU failed: {exc.strerror or exc}")


def _refusal(command: str, error: object) -> MonitorRefused:
    fields = error if isinstance(error, dict) else {}
    text = ascii(fields.get("desc", "no reason given"))[:300]
    return MonitorRefused(f"QEMU refused {command}: {text}", reason=str(fields.get("class", ""))[:64])


def _memory_size(session: _Session) -> int:
    size = _read_size(session.execute("query-memory-size-summary"), "base-memory")
    if size is None:
        raise MonitorGarbled("QEMU did not say how much memory the VM has")
    return size


def _find_hotplug(reply: object) -> object:
    """The data of the one virtio-mem device, an empty table without it."""
    for device in reply if isinstance(reply, list) else []:
        if isinstance(device, dict) and device.get("type") == "virtio-mem":
            return device.get("data")
    return {}


def _read_size(reply: object, key: str) -> int | None:
    value = reply.get(key) if isinstance(reply, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
