"""Control client of a running cloud-hypervisor: HTTP/1.1 over its Unix socket.

Used by the lifecycle through monitor.MonitorClient, in a worker thread. One connection per request, one
deadline over all of it, an answer of bounded length. HTTP is only as much as that server speaks: an answer
has a status line, headers and Content-Length bytes.
"""

from __future__ import annotations

import json
import re
import socket
import time
from typing import TYPE_CHECKING, Any

from vmsilod.vmm.disks import disk_id
from vmsilod.vmm.errors import (
    MonitorClosed,
    MonitorError,
    MonitorGarbled,
    MonitorRefused,
    MonitorTimeout,
    MonitorUnreachable,
)
from vmsilod.vmm.monitor import DEFAULT_TIMEOUT, BalloonState, DiskPlace, MemoryState
from vmsilod.vmm.net import check_device

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vmsilod.vmm.launch import NetDevice

API = "/api/v1"
MAX_HEAD = 16 * 1024
MAX_BODY = 1024 * 1024
EJECT_POLL_SECONDS = 0.05
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: [^\r\n]*)?")
_NO_CONTENT = 204


class CloudHypervisorMonitor:
    def __init__(self, path: Path, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._path = path
        self._timeout = timeout

    def power_button(self) -> None:
        self.request("PUT", "vm.power-button")

    def stop(self) -> None:
        # It may be gone before its answer is read, which is what was asked for.
        try:
            self.request("PUT", "vmm.shutdown")
        except MonitorClosed:
            return

    def suspend(self) -> None:
        self.request("PUT", "vm.pause")

    def resume(self) -> None:
        self.request("PUT", "vm.resume")

    def set_balloon(self, size: int) -> None:
        self.request("PUT", "vm.resize", {"desired_balloon": size})

    def balloon_state(self) -> BalloonState:
        info = _Info(self.request("GET", "vm.info"))
        # It says only what is left of all memory; a hot-plugged part that the guest has not taken is missing
        # there, too, and the balloon is never larger than it was asked to be.
        missing = info.size + info.hotplugged - info.actual
        return BalloonState(balloon=min(max(missing, 0), info.balloon))

    def resize_disk(self, place: DiskPlace, size: int) -> None:
        self.request("PUT", "vm.resize-disk", {"id": disk_id(place.serial), "desired_size": size})

    def resize_memory(self, size: int) -> None:
        self.request("PUT", "vm.resize", {"desired_ram": size})

    def memory_state(self) -> MemoryState:
        info = _Info(self.request("GET", "vm.info"))
        return MemoryState(
            requested=info.size + info.hotplugged,
            actual=min(info.actual + info.balloon, info.size + info.hotplug_limit),
            maximum=info.size + info.hotplug_limit,
        )

    def attach_net(self, net: NetDevice) -> None:
        if net.vhost_fds:
            raise MonitorRefused("cloud-hypervisor has no vhost-net")
        check_device(net)
        if self._has_device(net.id):
            # It would refuse, and keep the descriptors open until it ends (version 53).
            raise MonitorRefused(f"the VM has a network interface {net.name} already")
        wanted = {"id": net.id, "mac": net.mac, "num_queues": 2 * len(net.tap_fds)}
        self.request("PUT", "vm.add-net", wanted, net.tap_fds)

    def detach_net(self, device: str) -> None:
        deadline = time.monotonic() + self._timeout
        if not self._has_device(device):
            return
        self.request("PUT", "vm.remove-device", {"id": device})
        # It answers before the guest has given the device up, and reports that nowhere.
        while self._has_device(device):
            if time.monotonic() >= deadline:
                raise MonitorTimeout(f"the guest did not give {device} up in time")
            time.sleep(EJECT_POLL_SECONDS)

    def _has_device(self, device: str) -> bool:
        return device in _table(self.request("GET", "vm.info"), "device_tree")

    def request(
        self, method: str, name: str, body: dict[str, Any] | None = None, fds: Sequence[int] = ()
    ) -> Any:
        """The answer's JSON, or None without one; an HTTP error is raised as MonitorRefused. `fds` travel
        with the request and stay the caller's.
        """
        exchange = _Exchange(self._path, name, self._timeout)
        status, content = exchange.run(_compose(method, name, body), fds)
        if status >= 300:
            raise MonitorRefused(f"cloud-hypervisor refused {name}: {_shorten(content)}", reason=status)
        if not content:
            return None
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as exc:
            raise MonitorGarbled(f"cloud-hypervisor's answer to {name} is not JSON") from exc


class _Info:
    """The sizes in vm.info, in bytes."""

    def __init__(self, untrusted: object) -> None:
        config = _table(untrusted, "config")
        memory = _table(config, "memory")
        self.size = _size(memory, "size")
        self.hotplugged = _size(memory, "hotplugged_size", absent=0)
        self.hotplug_limit = _size(memory, "hotplug_size", absent=0)
        self.actual = _size(untrusted, "memory_actual_size")
        balloon = config.get("balloon")
        self.balloon = _size(balloon, "size", absent=0) if isinstance(balloon, dict) else 0


class _Exchange:
    """One connection with one request; lives for one call of CloudHypervisorMonitor.request."""

    def __init__(self, path: Path, name: str, timeout: float) -> None:
        self._path = path
        self._name = name
        self._deadline = time.monotonic() + timeout

    def run(self, request: bytes, fds: Sequence[int] = ()) -> tuple[int, bytes]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            self._limit(sock)
            try:
                sock.connect(str(self._path))
            except TimeoutError as exc:
                raise self._timed_out() from exc
            except OSError as exc:
                raise MonitorUnreachable(
                    f"no cloud-hypervisor listens on {self._path}: {exc.strerror or exc}"
                ) from exc
            try:
                self._limit(sock)
                sent = socket.send_fds(sock, [request], fds) if fds else 0
                sock.sendall(request[sent:])
                return self._read_answer(sock)
            except TimeoutError as exc:
                raise self._timed_out() from exc
            except (BrokenPipeError, ConnectionResetError) as exc:
                raise self._closed() from exc
            except OSError as exc:
                raise MonitorError(
                    f"the request {self._name} to cloud-hypervisor failed: {exc.strerror or exc}"
                ) from exc

    def _read_answer(self, sock: socket.socket) -> tuple[int, bytes]:
        seen = b""
        while b"\r\n\r\n" not in seen:
            if len(seen) > MAX_HEAD:
                raise self._garbled(f"has more than {MAX_HEAD} bytes of headers")
            seen += self._receive(sock)
        head, _, body = seen.partition(b"\r\n\r\n")
        status_line, *headers = head.split(b"\r\n")
        found = _STATUS_LINE.fullmatch(status_line)
        if found is None:
            raise self._garbled("does not begin like HTTP")
        status = int(found[1])
        length = 0 if status == _NO_CONTENT else self._find_length(headers)
        while len(body) < length:
            body += self._receive(sock)
        return status, body[:length]

    def _find_length(self, headers: list[bytes]) -> int:
        for header in headers:
            key, _, untrusted_value = header.partition(b":")
            if key.strip().lower() != b"content-length":
                continue
            text = untrusted_value.strip()
            if not text.isdigit() or len(text) > 10 or int(text) > MAX_BODY:
                raise self._garbled(f"is longer than {MAX_BODY} bytes")
            return int(text)
        return 0

    def _receive(self, sock: socket.socket) -> bytes:
        self._limit(sock)
        received = sock.recv(65536)
        if not received:
            raise self._closed()
        return received

    def _limit(self, sock: socket.socket) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._timed_out()
        sock.settimeout(left)

    def _timed_out(self) -> MonitorTimeout:
        return MonitorTimeout(f"cloud-hypervisor did not answer {self._name} in time")

    def _closed(self) -> MonitorClosed:
        return MonitorClosed(f"cloud-hypervisor ended without an answer to {self._name}")

    def _garbled(self, fact: str) -> MonitorGarbled:
        return MonitorGarbled(f"cloud-hypervisor's answer to {self._name} {fact}")


def _compose(method: str, name: str, body: dict[str, Any] | None) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {API}/{name} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
    if content:
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return head.encode() + b"\r\n" + content


def _table(untrusted: object, key: str) -> dict[str, Any]:
    value = untrusted.get(key) if isinstance(untrusted, dict) else None
    if not isinstance(value, dict):
        raise MonitorGarbled(f"cloud-hypervisor's description of the VM has no {key}")
    return value


def _size(untrusted: object, key: str, *, absent: int | None = None) -> int:
    value = untrusted.get(key) if isinstance(untrusted, dict) else None
    if value is None and absent is not None:
        return absent
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise MonitorGarbled(f"cloud-hypervisor's description of the VM has no {key}")
    return value


def _shorten(untrusted_content: bytes) -> str:
    """The errors are a JSON list, outermost first; the last says most."""
    try:
        errors = json.loads(untrusted_content)
    except (ValueError, RecursionError):
        return ascii(untrusted_content)[:300]
    if isinstance(errors, list) and errors:
        return ": ".join(ascii(error)[1:-1] for error in errors[-3:])[:300]
    return ascii(errors)[:300]
