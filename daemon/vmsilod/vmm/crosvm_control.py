"""Control client of a running crosvm: JSON packets on its SOCK_SEQPACKET socket.

Used by the lifecycle through monitor.MonitorClient, in a worker thread. One connection per request. crosvm
does not answer a request that it cannot parse, nor a balloon request that waits for a hung guest, so every
wait has an end.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vmsilod.vmm.errors import (
    MonitorClosed,
    MonitorError,
    MonitorGarbled,
    MonitorRefused,
    MonitorTimeout,
    MonitorUnreachable,
)
from vmsilod.vmm.monitor import DEFAULT_TIMEOUT, AttachedUsb, BalloonState, DiskPlace, MemoryState

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from vmsilod.vmm.launch import NetDevice

MAX_REPLY = 64 * 1024
USB_PORTS = 16  # of its xHCI, and of the fixed-size lists of its protocol

_HINTS = {
    errno.ENOTCONN: "the guest has not loaded its balloon driver",
    errno.EOPNOTSUPP: "this crosvm was built without it, or the VM has no such device",
    errno.EINVAL: "the VM is in a state that does not allow it",
    errno.ENODEV: "this crosvm was built without it, or the VM has no such device",
}


# Answers to a UsbCommand; `NoSuchPort` and `NoSuchDevice` to a detach are as good as done.
_USB_ANSWERS = {
    "NoAvailablePort": "every port of the VM's USB controller that fits is taken",
    "NoSuchDevice": "it cannot use the device",
    "FailedToOpenDevice": "it cannot use the device",
    "FailedToInitHostDevice": "it cannot use the device",
}
_USB_GONE = ("NoSuchPort", "NoSuchDevice")


class CrosvmMonitor:
    returns_usb_to_host = False

    def __init__(self, path: Path, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._path = path
        self._timeout = timeout

    def power_button(self) -> None:
        self._order("Powerbtn")

    def stop(self) -> None:
        # crosvm may be gone before its "Ok" is read, which is what was asked for.
        try:
            self._order("Exit")
        except MonitorClosed:
            return

    def suspend(self) -> None:
        # vCPUs only: a full suspend fails with some devices and then leaves the vCPUs stopped.
        self._order("SuspendVcpus")

    def resume(self) -> None:
        self._order("ResumeVcpus")

    def set_balloon(self, size: int) -> None:
        self._order({"BalloonCommand": {"Adjust": {"num_bytes": size, "wait_for_success": False}}})

    def balloon_state(self) -> BalloonState:
        reply = self.request({"BalloonCommand": "Stats"})
        untrusted = reply.get("BalloonStats") if isinstance(reply, dict) else None
        stats = untrusted.get("stats") if isinstance(untrusted, dict) else None
        if not isinstance(untrusted, dict) or not isinstance(stats, dict):
            raise MonitorGarbled(f"crosvm answered a balloon request with {_shorten(reply)}")
        balloon = _read_size(untrusted, "balloon_actual")
        if balloon is None:
            raise MonitorGarbled("crosvm did not say how large the balloon is")
        return BalloonState(
            balloon=balloon,
            guest_total=_read_size(stats, "total_memory"),
            guest_free=_read_size(stats, "free_memory"),
            guest_available=_read_size(stats, "available_memory"),
        )

    def attach_usb(self, fd: int, label: str) -> str:
        # crosvm has no names for its devices, so the label is not used.
        del label
        answer = self._request_usb({"AttachDevice": {"file": 0}}, fd)
        return str(_read_port(answer))

    def detach_usb(self, handle: str) -> None:
        answer = self._request_usb({"DetachDevice": {"port": int(handle)}})
        if answer not in _USB_GONE:
            _read_port(answer)

    def list_usb(self) -> list[AttachedUsb]:
        answer = self._request_usb({"ListDevice": {"ports": list(range(USB_PORTS))}})
        untrusted = answer.get("Devices") if isinstance(answer, dict) else None
        if not isinstance(untrusted, list):
            raise MonitorGarbled(f"crosvm answered a USB request with {_shorten(answer)}")
        found = []
        for entry in untrusted[:USB_PORTS]:
            fields = entry if isinstance(entry, dict) else {}
            numbers = [_read_size(fields, key) for key in ("port", "vendor_id", "product_id")]
            port, vendor, product = numbers
            if port and vendor is not None and product is not None:
                found.append(AttachedUsb(str(port), ids=f"{vendor & 0xFFFF:04x}:{product & 0xFFFF:04x}"))
        return found

    def _request_usb(self, command: dict[str, Any], *fds: int) -> Any:
        reply = self.request({"UsbCommand": command}, fds)
        if not isinstance(reply, dict) or "UsbResponse" not in reply:
            raise MonitorGarbled(f"crosvm answered a USB request with {_shorten(reply)}")
        return reply["UsbResponse"]

    def resize_disk(self, place: DiskPlace, size: int) -> None:
        command = {"disk_index": place.index, "command": {"Resize": {"new_size": size}}}
        self._order({"DiskCommand": command})

    def resize_memory(self, size: int) -> None:
        raise MonitorRefused(
            f"crosvm cannot plug memory in or out ({size} bytes asked for)",
            'use vmm = "cloud-hypervisor" or "qemu" with memory_max',
        )

    def memory_state(self) -> MemoryState:
        raise MonitorRefused(
            "crosvm cannot plug memory in or out", 'use vmm = "cloud-hypervisor" or "qemu" with memory_max'
        )

    def attach_net(self, net: NetDevice) -> None:
        # Its pci-hotplug takes the name of a TAP, which its uid would have to own.
        raise MonitorRefused(
            f"crosvm takes no network interface while it runs ({net.name})",
            'restart the VM, or use vmm = "cloud-hypervisor" or "qemu" with machine = "q35"',
        )

    def detach_net(self, device: str) -> None:
        raise MonitorRefused(
            f"crosvm gives no network interface back while it runs ({device})",
            'restart the VM, or use vmm = "cloud-hypervisor" or "qemu" with machine = "q35"',
        )

    def request(self, request: str | dict[str, Any], fds: Sequence[int] = ()) -> Any:
        """Sends one VmRequest, with descriptors that stay the caller's, and returns the VmResponse; an Err
        or ErrString in it is raised as MonitorRefused.
        """
        name = request if isinstance(request, str) else next(iter(request))
        with self._connect() as sock, _translated(name):
            socket.send_fds(sock, [json.dumps(request).encode()], fds)
            packet, _, flags, _ = sock.recvmsg(MAX_REPLY)
        if not packet:
            raise MonitorClosed(f"crosvm ended without an answer to {name}")
        if flags & socket.MSG_TRUNC:
            raise MonitorGarbled(f"crosvm's answer to {name} is longer than {MAX_REPLY} bytes")
        try:
            reply = json.loads(packet)
        except (ValueError, RecursionError) as exc:
            raise MonitorGarbled(f"crosvm's answer to {name} is not JSON") from exc
        _check_refusal(name, reply)
        return reply

    def _order(self, request: str | dict[str, Any]) -> None:
        reply = self.request(request)
        if reply != "Ok":
            raise MonitorGarbled(f"crosvm answered {_shorten(reply)} instead of Ok")

    @contextmanager
    def _connect(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(self._timeout)
            try:
                sock.connect(str(self._path))
            except OSError as exc:
                raise MonitorUnreachable(
                    f"no crosvm listens on {self._path}: {exc.strerror or exc}"
                ) from exc
            yield sock


@contextmanager
def _translated(name: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError as exc:
        raise MonitorTimeout(f"crosvm did not answer {name} in time") from exc
    except (BrokenPipeError, ConnectionResetError) as exc:
        raise MonitorClosed(f"crosvm ended without an answer to {name}") from exc
    except OSError as exc:
        raise MonitorError(f"the request {name} to crosvm failed: {exc.strerror or exc}") from exc


def _check_refusal(name: str, reply: object) -> None:
    if not isinstance(reply, dict):
        return
    number = reply.get("Err")
    if isinstance(number, int):
        text = os.strerror(number)
        raise MonitorRefused(f"crosvm refused {name}: {text}", _HINTS.get(number, ""), reason=number)
    if "Err" in reply or "ErrString" in reply:
        raise MonitorRefused(f"crosvm refused {name}: {_shorten(reply)}")


def _read_port(answer: object) -> int:
    done = answer.get("Ok") if isinstance(answer, dict) else None
    port = _read_size(done, "port") if isinstance(done, dict) else None
    if port is not None:
        return port
    if isinstance(answer, str) and answer in _USB_ANSWERS:
        raise MonitorRefused(f"crosvm refused: {_USB_ANSWERS[answer]}", reason=answer)
    raise MonitorGarbled(f"crosvm answered a USB request with {_shorten(answer)}")


def _read_size(fields: dict[str, Any], key: str) -> int | None:
    value = fields.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64:
        return value
    return None


def _shorten(untrusted_reply: object) -> str:
    return ascii(untrusted_reply)[:200]
