"""A QEMU as far as its monitor socket shows it, with the host USB devices and network interfaces that it has
been given.

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
    """`devices` maps an id to what its descriptor leads to, for a network interface to its port. `netdevs`
    maps an id to the descriptors of its queues, `ports` are free or taken by an id, `cut` are links set
    down. `late` sends DEVICE_DELETED after the answer, `silent` never. The first device_add takes `slow`
    seconds.
    """

    def __init__(
        self, path: Path, *, late: bool = False, silent: bool = False, refuse: str = "", slow: float = 0
    ) -> None:
        self.devices: dict[str, str] = {}
        self.commands: list[str] = []
        self.fdsets: dict[int, int] = {}
        self.named: dict[str, int] = {}
        self.netdevs: dict[str, list[int]] = {}
        self.ports: dict[str, str] = {"netport0": "net-wan", "netport1": ""}
        self.cut: list[str] = []
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
        left = [*self.fdsets.values(), *self.named.values()]
        for fd in (fd for fds in self.netdevs.values() for fd in fds):
            os.close(fd)
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
            port = self.devices.pop(arguments["id"], None)
            if port is None:
                return [{"error": {"class": "DeviceNotFound", "desc": "Device not found"}}]
            self.ports |= {port: ""} if port in self.ports else {}
            if self._silent:
                return [done]
            event = {"event": "DEVICE_DELETED", "data": {"device": arguments["id"], "path": "/x"}}
            return [done, {"event": "RTC_CHANGE"}, event] if self._late else [event, done]
        elif command == "qom-list":
            return [
                {"return": [{"name": name, "type": "child<x>"} for name in self._list(arguments["path"])]}
            ]
        elif command in ("getfd", "closefd", "netdev_add", "netdev_del", "set_link"):
            return [self._change_net(command, arguments, fds)]
        return [done]

    def _list(self, path: str) -> list[str]:
        *_, last = path.split("/")
        if last == "peripheral":
            return ["type", "root0", *self.ports, *self.devices]
        return ["type", *(["child[0]"] if self.ports[last] else [])]

    def _change_net(self, command: str, arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        if command == "getfd":
            (self.named[arguments["fdname"]],) = fds
        elif command == "closefd":
            if arguments["fdname"] not in self.named:
                return {"error": {"class": "GenericError", "desc": "File descriptor named so not found"}}
            os.close(self.named.pop(arguments["fdname"]))
        elif command == "netdev_add":
            if arguments["id"] in self.netdevs:
                return {"error": {"class": "GenericError", "desc": "Duplicate ID"}}
            names = arguments["fds"].split(":") + arguments.get("vhostfds", "").split(":")
            self.netdevs[arguments["id"]] = [self.named.pop(name) for name in names if name]
        elif command == "netdev_del":
            for fd in self.netdevs.pop(arguments["id"], []):
                os.close(fd)
        else:
            self.cut.append(arguments["name"])
        return {"return": {}}

    def _add(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments["driver"] == "virtio-net-pci":
            assert arguments["netdev"] in self.netdevs
            assert not self.ports[arguments["bus"]]
            self.ports[arguments["bus"]] = self.devices[arguments["id"]] = arguments["bus"]
            return {"return": {}}
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
