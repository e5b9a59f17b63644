"""A client of org.vmsilo1 as any user, on jeepney; used by the bus tests.

A function runs in a child process with another uid, because the bus takes the uid from the socket.
"""

from __future__ import annotations

import os
import pickle
import select
import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from jeepney import DBusAddress, HeaderFields, MessageFlag, MessageType, new_method_call
from jeepney.io.blocking import open_dbus_connection

if TYPE_CHECKING:
    from collections.abc import Callable

    from jeepney.io.blocking import DBusConnection

T = TypeVar("T")

ROOT = "/org/vmsilo1"
MANAGER = "org.vmsilo1.Manager"
VM = "org.vmsilo1.VM"
PROPERTIES = "org.freedesktop.DBus.Properties"
OBJECTS = "org.freedesktop.DBus.ObjectManager"
CALL_SECONDS = 30


class BusError(Exception):
    """An error reply: args are its D-Bus name and its text."""


class Client:
    def __init__(self, address: str) -> None:
        self.con: DBusConnection = open_dbus_connection(address, enable_fds=True)
        self._replies: dict[int, Any] = {}
        self._signals: list[tuple[str, Any]] = []

    def send(
        self, path: str, interface: str, method: str, signature: str = "", *body: Any, **flags: Any
    ) -> int:
        """Send a call without waiting; returns its serial."""
        target = DBusAddress(path, "org.vmsilo1", interface)
        message = new_method_call(target, method, signature or None, body)
        if flags.get("interactive"):
            message.header.flags |= MessageFlag.allow_interactive_authorization
        serial = int(next(self.con.outgoing_serial))
        self.con.send(message, serial=serial)
        return serial

    def result(self, serial: int) -> Any:
        """The first value of the reply to a sent call; BusError for an error reply."""
        body = self.body(serial)
        return body[0] if body else None

    def body(self, serial: int) -> tuple[Any, ...]:
        """Every value of the reply to a sent call; BusError for an error reply."""
        while serial not in self._replies:
            self._receive(CALL_SECONDS)
        reply = self._replies.pop(serial)
        if reply.header.message_type == MessageType.error:
            name = reply.header.fields[HeaderFields.error_name]
            raise BusError(name, reply.body[0] if reply.body else "")
        return tuple(reply.body)

    def call(
        self, path: str, interface: str, method: str, signature: str = "", *body: Any, **flags: Any
    ) -> Any:
        return self.result(self.send(path, interface, method, signature, *body, **flags))

    def manager(self, method: str, signature: str = "", *body: Any, **flags: Any) -> Any:
        return self.call(ROOT, MANAGER, method, signature, *body, **flags)

    def has_result(self, serial: int) -> bool:
        """Whether the reply has been read by now, while another was waited for."""
        return serial in self._replies

    def error_of(self, serial: int) -> str:
        """The D-Bus name of the error that a sent call ends in, "" for success."""
        try:
            self.result(serial)
        except BusError as error:
            return str(error.args[0])
        return ""

    def error(
        self, path: str, interface: str, method: str, signature: str = "", *body: Any, **flags: Any
    ) -> str:
        return self.error_of(self.send(path, interface, method, signature, *body, **flags))

    def signals(self, count: int, seconds: float = 3) -> list[tuple[str, Any]]:
        """The next signals of org.vmsilo1 as (member, body): `count`, or what has come by `seconds`."""
        deadline = time.monotonic() + seconds
        while len(self._signals) < count:
            try:
                self._receive(max(0.001, deadline - time.monotonic()))
            except TimeoutError:
                break
        seen, self._signals = self._signals[:count], self._signals[count:]
        return seen

    def _receive(self, seconds: float) -> None:
        message = self.con.receive(timeout=seconds)
        fields = message.header.fields
        if message.header.message_type != MessageType.signal:
            self._replies[fields[HeaderFields.reply_serial]] = message
        elif fields[HeaderFields.path].startswith(ROOT):
            self._signals.append((fields[HeaderFields.member], message.body))


class Child(Generic[T]):
    """function() in a child process of that uid; needs root."""

    def __init__(self, uid: int, function: Callable[[], T]) -> None:
        self._read, write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._read)
            with os.fdopen(write, "wb") as out:
                pickle.dump(_outcome_as(uid, function), out)
            os._exit(0)
        os.close(write)

    def is_done(self) -> bool:
        return bool(select.select([self._read], [], [], 0)[0])

    def result(self) -> T:
        """What function returned; what it raised is raised here. To be called once."""
        with os.fdopen(self._read, "rb") as data:
            worked, value = pickle.loads(data.read())
        os.waitpid(self._pid, 0)
        if not worked:
            raise value
        return value  # type: ignore[no-any-return]  # through the pickle


def as_user(uid: int, function: Callable[[], T]) -> T:
    return Child(uid, function).result()


def _outcome_as(uid: int, function: Callable[[], T]) -> tuple[bool, Any]:
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        return True, function()
    except BaseException as error:
        return False, error
