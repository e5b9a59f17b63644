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
from vmsilod.vmm.monitor import DEFAULT_TIMEOUT, BalloonState, MemoryState

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_REPLY = 64 * 1024

_HINTS = {
    errno.ENOTCONN: "the guest has not loaded its balloon driver",
    errno.EOPNOTSUPP: "this crosvm was built without it, or the VM has no such device",
    errno.EINVAL: "the VM is in a state that does not allow it",
}


class CrosvmMonitor:
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

    def resize_memory(self, size: int) -> None:
        raise MonitorRefused(
            f"crosvm cannot plug memory in or out ({size} bytes asked for)",
            'use vmm = "cloud-hypervisor" or "qemu" with memory_max',
        )

    def memory_state(self) -> MemoryState:
        raise MonitorRefused(
            "crosvm cannot plug memory in or out", 'use vmm = "cloud-hypervisor" or "qemu" with memory_max'
        )

    def request(self, request: str | dict[str, Any]) -> Any:
        """Sends one VmRequest and returns the VmResponse; an Err or ErrString in it is raised as
        MonitorRefused.
        """
        name = request if isinstance(request, str) else next(iter(request))
        with self._connect() as sock, _translated(name):
            sock.send(json.dumps(request).encode())
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


def _read_size(fields: dict[str, Any], key: str) -> int | None:
    value = fields.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64:
        return value
    return None


def _shorten(untrusted_reply: object) -> str:
    return ascii(untrusted_reply)[:200]
