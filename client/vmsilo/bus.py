"""Calls to vmsilod over the system bus, with jeepney, which is imported when the first call is made.

One Bus per program, closed by whoever opened it. Every call has a time limit. Errors of the daemon arrive
here as a fact and a hint; nothing else in the client knows D-Bus.
"""

import os
import sys
import time

from vmsilo.errors import ClientError, printable, split_message
from vmsilo.place import Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

BUS_NAME = "org.vmsilo1"
OBJECT_PATH = "/org/vmsilo1"
INTERFACE = "org.vmsilo1.Manager"
QUICK = 10  # seconds for a question
START_WAIT = 3700  # seconds; vmsilod's own limit, the start_timeout, is shorter and says more
CONNECT_WAIT = 5
TICK = 0.5

ABSENT = (
    "org.freedesktop.DBus.Error.ServiceUnknown",
    "org.freedesktop.DBus.Error.NameHasNoOwner",
    "org.freedesktop.DBus.Error.Spawn.ChildExited",
    "org.freedesktop.systemd1.NoSuchUnit",
)
DENIED = (
    "org.freedesktop.DBus.Error.AccessDenied",
    "org.freedesktop.DBus.Error.AuthFailed",
    "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired",
)
NOT_RUNNING_HINT = "systemctl status vmsilod"


class NotRunningError(ClientError):
    """There is no vmsilod to ask."""


class RemoteError(ClientError):
    """vmsilod refused or failed; `code` is the last part of the error's D-Bus name."""

    def __init__(self, fact: str, hint: str, code: str) -> None:
        super().__init__(fact, hint)
        self.code = code


class Bus:
    def __init__(self, place: Place, *, interactive: bool = False) -> None:
        """`interactive`: polkit may ask the person at the terminal or on the desktop for a password."""
        sys.path += [d for d in place.site_dirs if d not in sys.path]
        try:
            import jeepney
            from jeepney.io.blocking import open_dbus_connection
            from jeepney.low_level import MessageFlag
        except ImportError as exc:
            raise ClientError(
                "the Python module jeepney is not installed",
                "install python3-jeepney (Arch: python-jeepney)",
            ) from exc
        self._jeepney = jeepney
        self._flags = MessageFlag.allow_interactive_authorization if interactive else MessageFlag(0)
        try:
            self._connection = open_dbus_connection("SYSTEM", enable_fds=True, auth_timeout=CONNECT_WAIT)
        except (OSError, ValueError, jeepney.auth.AuthenticationError) as exc:
            raise NotRunningError(f"cannot connect to the system bus: {printable(exc)}") from exc

    def call(
        self,
        method: str,
        signature: str = "",
        body: "tuple[Any, ...]" = (),
        *,
        wait: float = QUICK,
        tick: "Callable[[], None] | None" = None,
    ) -> "Any":
        """The reply's values. `wait` in seconds; `tick` is called every TICK of them."""
        jeepney = self._jeepney
        address = jeepney.DBusAddress(OBJECT_PATH, bus_name=BUS_NAME, interface=INTERFACE)
        message = jeepney.new_method_call(address, method, signature or None, body)
        message.header.flags |= self._flags
        try:
            if tick is None:
                reply = self._connection.send_and_get_reply(message, timeout=wait)
            else:
                reply = self._await_reply(message, wait, tick)
        except TimeoutError as exc:
            raise ClientError(
                f"vmsilod did not answer {method} within {wait:g} s", NOT_RUNNING_HINT
            ) from exc
        except (OSError, EOFError) as exc:
            raise ClientError(f"the system bus closed the connection: {printable(exc)}") from exc
        if reply.header.message_type == jeepney.MessageType.error:
            raise _translate(reply, jeepney.HeaderFields)
        return reply.body

    def _await_reply(self, message: "Any", wait: float, tick: "Callable[[], None]") -> "Any":
        deadline = time.monotonic() + wait
        serial = next(self._connection.outgoing_serial)
        self._connection.send(message, serial=serial)
        while True:
            try:
                reply = self._connection.receive(timeout=TICK)
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise
                tick()
                continue
            if reply.header.fields.get(self._jeepney.HeaderFields.reply_serial) == serial:
                return reply

    def find_vms(self) -> "list[dict[str, Any]]":
        """The properties of every VM, without D-Bus types."""
        (vms,) = self.call("List")
        return [{key: value for key, (_signature, value) in vm.items()} for vm in vms]

    def find_network(self, name: str) -> "list[dict[str, Any]]":
        """The interfaces of a VM, without D-Bus types."""
        (ports,) = self.call("GetNetwork", "s", (name,))
        return [{key: value for key, (_signature, value) in port.items()} for port in ports]

    def find_vm(self, name: str) -> "dict[str, Any] | None":
        return next((vm for vm in self.find_vms() if vm.get("Name") == name), None)

    def watch_states(self) -> None:
        """From here on `read_states` sees signals."""
        jeepney = self._jeepney
        rule = jeepney.MatchRule(
            type="signal", interface=INTERFACE, member="VmStateChanged", path=OBJECT_PATH
        )
        message = jeepney.message_bus.AddMatch(rule)
        try:
            self._connection.send_and_get_reply(message, timeout=QUICK)
        except (TimeoutError, OSError) as exc:
            raise ClientError(f"the system bus did not answer: {printable(exc)}") from exc

    def fileno(self) -> int:
        return int(self._connection.sock.fileno())

    def read_states(self) -> list[tuple[str, str, str]]:
        """(name, state, reason) of the changes that have come; ClientError when the bus is gone."""
        found: list[tuple[str, str, str]] = []
        fields = self._jeepney.HeaderFields
        while True:
            try:
                message = self._connection.receive(timeout=0)
            except TimeoutError:
                return found
            except (OSError, EOFError) as exc:
                raise ClientError("the system bus closed the connection") from exc
            if message.header.fields.get(fields.member) == "VmStateChanged" and len(message.body) >= 3:
                name, state, reason = message.body[:3]
                found.append((str(name), str(state), str(reason)))

    def close(self) -> None:
        self._connection.close()


def _translate(reply: "Any", fields: "Any") -> ClientError:
    name = str(reply.header.fields.get(fields.error_name, ""))
    fact, hint = split_message(str(reply.body[0]) if reply.body else name)
    if name in ABSENT:
        return NotRunningError("vmsilo is not running", NOT_RUNNING_HINT)
    if name in DENIED:
        return ClientError(f"not allowed: {fact}", hint)
    return RemoteError(fact, hint, printable(name.rpartition(".")[2]))


def check_known(bus: Bus, name: str, place: Place) -> "dict[str, Any]":
    """The VM's properties; a ClientError that offers close names if there is no such VM."""
    vms = bus.find_vms()
    for vm in vms:
        if vm.get("Name") == name:
            return vm
    raise unknown_vm(name, [str(vm.get("Name", "")) for vm in vms], place)


def unknown_vm(name: str, known: list[str], place: Place) -> ClientError:
    from vmsilo.names import find_close, is_name, list_names

    known = [n for n in known if is_name(n)] or list_names(place)
    if not known:
        return ClientError(f"no VM '{name}'", f"define one in /etc/vmsilo/vms.d/{name}.toml")
    return ClientError(f"no VM '{name}'", find_close(name, known) or "vmsilo list")


def describe_end(vm: "dict[str, Any]") -> str:
    """Why a VM is not running, as a fact."""
    problems = vm.get("Problems") or []
    if vm.get("State") == "broken" and problems:
        return printable(problems[0])
    texts = [printable(vm.get(key) or "") for key in ("LastResult", "Status")]
    return ": ".join(dict.fromkeys(t for t in texts if t and t != "success")) or printable(
        vm.get("State", "unknown")
    )


def is_interactive() -> bool:
    return os.isatty(0)
