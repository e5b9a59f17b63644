"""A QEMU as far as its monitor socket shows it, with the host USB devices that it has been given.

Serves one connection after the other, as QEMU does. It checks what QEMU would check: unknown ids, an id that
is taken, a descriptor set that is not there.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 0}}, "capabilities": ["oob"]}}


class QmpServer:
    """`devices` maps an id to what its descriptor leads to. `late` sends DEVICE_DELETED after the answer,
    `silent` never. The first device_add takes `slow` seconds.
    """

    def __init__(
        self, path: Path, *, late: bool = False, silent: bool = False, refuse: str = "", slow: float = 0
    ) -> None:
        self.devices: dict[str, str] = {}
        self.commands: list[str] = []
        self.fdsets: dict[int, int] = {}
        self._late, self._silent, self._refuse, self._slow = late, silent, refuse, slow
        self._next = 0
        self._over = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> QmpServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._over = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        left = list(self.fdsets.values())
        for fd in left:
            os.close(fd)
        assert not self._thread.is_alive()
        assert kind is not None or not left, "a descriptor was left in QEMU"

    def _serve(self) -> None:
        while not self._over:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, suppress(BrokenPipeError, ConnectionResetError):
                self._answer_all(connection)
            # As QEMU does with the sets of a monitor that is gone and that no device uses.
            for fd in [self.fdsets.pop(number) for number in list(self.fdsets)]:
                os.close(fd)

    def _answer_all(self, connection: socket.socket) -> None:
        self._send(connection, GREETING)
        while True:
            line, fds, _, _ = socket.recv_fds(connection, 65536, 4)
            if not line:
                return
            request = json.loads(line)
            self.commands.append(request["execute"])
            for message in self._answer(request["execute"], request.get("arguments", {}), fds):
                self._send(connection, message)

    def _answer(self, command: str, arguments: dict[str, Any], fds: list[int]) -> list[dict[str, Any]]:
        done: dict[str, Any] = {"return": {}}
        if command == self._refuse:
            for fd in fds:
                os.close(fd)
            return [{"error": {"class": "GenericError", "desc": "failed to open host usb device \x1b"}}]
        if command == "add-fd":
            (fd,) = fds
            self._next += 1
            self.fdsets[self._next] = fd
            return [{"return": {"fdset-id": self._next, "fd": fd}}]
        if command == "remove-fd":
            os.close(self.fdsets.pop(arguments["fdset-id"]))
        elif command == "device_add":
            seconds, self._slow = self._slow, 0
            time.sleep(seconds)
            return [self._add(arguments)]
        elif command == "device_del":
            if self.devices.pop(arguments["id"], None) is None:
                return [{"error": {"class": "DeviceNotFound", "desc": "Device not found"}}]
            if self._silent:
                return [done]
            event = {"event": "DEVICE_DELETED", "data": {"device": arguments["id"], "path": "/x"}}
            return [done, {"event": "RTC_CHANGE"}, event] if self._late else [event, done]
        elif command == "qom-list":
            names = ["type", "root0", *self.devices]
            return [{"return": [{"name": name, "type": "child<x>"} for name in names]}]
        return [done]

    def _add(self, arguments: dict[str, Any]) -> dict[str, Any]:
        assert arguments["driver"] == "usb-host"
        assert arguments["bus"] == "usb.0"
        fd = self.fdsets[int(arguments["hostdevice"].removeprefix("/dev/fdset/"))]
        if arguments["id"] in self.devices:
            return {"error": {"class": "GenericError", "desc": "Duplicate device ID"}}
        self.devices[arguments["id"]] = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
        return {"return": {}}

    @staticmethod
    def _send(connection: socket.socket, message: dict[str, Any]) -> None:
        connection.sendall(json.dumps(message).encode() + b"\r\n")
