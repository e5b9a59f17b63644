"""pydbus's object wrapper, made fit for a privileged daemon: one path from each message to one reply.

What pydbus 0.6.0 lacks is added here: authorisation before the handler, handlers that are coroutines,
descriptors in both directions, named errors, no text of an internal error to a caller. What it leaks is
released: the invocation on GLib before 2.84, the descriptors of every message, the object after its end.
Called by service.py. It knows nothing of VMs but the name that an object stands for. A registration lives
until its close().
"""

from __future__ import annotations

import ctypes
import fcntl
import inspect
import logging
import os
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from gi.repository import Gio, GLib
from pydbus.registration import ObjectWrapper

from vmsilod import closing, loop
from vmsilod.bus.actions import PROPERTIES_INTERFACE, VIEW, Message, Need, classify
from vmsilod.bus.polkit import Authority, Question
from vmsilod.errors import BadRequest, Busy, Failed, shown_error, wire_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmsilod.bus.callers import Audience, Callers
    from vmsilod.bus.faults import FaultLog

log = logging.getLogger(__name__)

# Arguments become Python objects before the authorisation, so a stranger's message must not cost much.
ARGUMENT_BYTES_MAX = 1 << 20
TAKE_DESCRIPTORS = ("StartDebug", "CreateDisposableHere")
_PROPERTY_REPLIES = {"Get": ["v"], "GetAll": ["a{sv}"]}


class Exportable(Protocol):
    """An object for the bus: hashable, with pydbus signals and methods that take the Call first."""

    vm_name: str | None

    def read_properties(self, interface: str) -> Mapping[str, GLib.Variant]: ...


@dataclass(frozen=True)
class Gate:
    """What every message passes through."""

    callers: Callers
    authority: Authority
    audience: Audience
    faults: FaultLog


class Call:
    """One method call: its sender and descriptors, and the one reply to it."""

    def __init__(self, invocation: Gio.DBusMethodInvocation) -> None:
        message = invocation.get_message()
        attached = message.get_unix_fd_list()
        self._invocation = invocation
        self._fds: list[int] = list(attached.steal_fds()) if attached is not None else []
        self.sender: str = invocation.get_sender()
        self.uid = -1  # of a caller that had gone before anybody could ask
        self._counted = False
        flags = message.get_flags()
        self.interactive = bool(flags & Gio.DBusMessageFlags.ALLOW_INTERACTIVE_AUTHORIZATION)

    def take_fd(self, untrusted_handle: int) -> int:
        """A descriptor of the caller's, which the taker owns.

        An argument of type h is an index into the message.
        """
        if not 0 <= untrusted_handle < len(self._fds):
            raise BadRequest("the message has no such descriptor")
        try:
            return fcntl.fcntl(self._fds[untrusted_handle], fcntl.F_DUPFD_CLOEXEC, 3)
        except OSError as error:
            raise Failed("no descriptor is free") from error

    def admit(self, uid: int) -> None:
        """Busy if the user has too many descriptors here, which wait for polkit or for their close."""
        self.uid, self._counted = uid, True
        if self._fds and not closing.receive(uid, len(self._fds)):
            raise Busy("too many descriptors of yours are open here", "try again")

    def close(self) -> None:
        """Give away what came with the message: the loop does not wait for its close."""
        fds, self._fds = self._fds, []
        (closing.close_received if self._counted else closing.close_later)(self.uid, fds)

    def answer(self, types: Sequence[str], result: Any) -> None:
        """Reply with the handler's result. A descriptor in it is duplicated into the message and closed."""
        reply, attached = _pack(types, result)
        self.close()
        self._invocation.return_value_with_unix_fd_list(reply, attached)
        _release(self._invocation)

    def refuse(self, name: str, text: str) -> None:
        self.close()
        self._invocation.return_dbus_error(name, text)
        _release(self._invocation)


class Exported(ObjectWrapper):  # type: ignore[misc]  # pydbus has no types
    """One exported object. pydbus calls `call_method` for every message, property reads included."""

    def __init__(self, target: Exportable, interfaces: Sequence[Gio.DBusInterfaceInfo], gate: Gate) -> None:
        super().__init__(target, interfaces)
        self._gate = gate

    def call_method(self, *args: Any) -> None:
        _con, _sender, _path, interface, method, parameters, invocation, *_ = args
        loop.spawn(self._serve(Call(invocation), interface, method, parameters))

    async def _serve(self, call: Call, interface: str, method: str, parameters: GLib.Variant) -> None:
        try:
            call.admit(await self._gate.callers.find_uid(call.sender))
            if method not in TAKE_DESCRIPTORS:
                call.close()  # nothing else takes descriptors, and none are to wait for polkit's answer
            if parameters.get_size() > ARGUMENT_BYTES_MAX:
                raise BadRequest(f"the arguments are larger than {ARGUMENT_BYTES_MAX >> 10} KiB")
            # Unpacked once: what is authorised is what is handled.
            message = Message(interface, method, self.object.vm_name, tuple(parameters.unpack()))
            await self._authorize(call, classify(message))
            result = await self._handle(call, message)
            types = _PROPERTY_REPLIES.get(method) if interface == PROPERTIES_INTERFACE else None
            call.answer(types or self.outargs[f"{interface}.{method}"], result)
        except BaseException as error:  # the outermost edge; SystemExit in a handler must not end the daemon
            shown = shown_error(error)
            self._gate.faults.report(error, f"{interface}.{method}", call.uid)
            call.refuse(wire_of(shown).dbus_name, shown.text)

    async def _authorize(self, call: Call, need: Need) -> None:
        gate = self._gate
        for action in need.actions:
            await gate.authority.check(
                Question(call.sender, call.uid, action, need.details, interactive=call.interactive)
            )
        if VIEW in need.actions:
            gate.audience.admit(call.sender, call.uid)

    async def _handle(self, call: Call, message: Message) -> Any:
        if message.interface == PROPERTIES_INTERFACE:
            properties = self.object.read_properties(message.arguments[0])
            # GDBus has answered a read of an unknown property before it comes here.
            return properties[message.arguments[1]] if message.method == "Get" else dict(properties)
        result = getattr(self.object, message.method)(call, *message.arguments)
        if inspect.isawaitable(result):
            return await result
        if isinstance(result, Future):
            return await loop.wait_for(result)
        return result


class Registration:
    """An object on the bus until close()."""

    def __init__(
        self,
        con: Gio.DBusConnection,
        path: str,
        target: Exportable,
        interfaces: Sequence[Gio.DBusInterfaceInfo],
        gate: Gate,
    ) -> None:
        self._con = con
        self._target = target
        self._interfaces = interfaces
        self._exported = Exported(target, interfaces, gate)
        self._ids: list[int] = []

        def emit(interface: str, signal: str, args: GLib.Variant) -> None:
            gate.audience.emit(path, interface, signal, args)

        self._exported.SignalEmitted.connect(emit)
        try:
            for interface in interfaces:
                self._ids.append(
                    con.register_object(path, interface, self._exported.call_method, None, None)
                )
        except GLib.Error as error:
            self.close()
            raise Failed(f"cannot export {path}: {error.message}") from error

    def close(self) -> None:
        ids, self._ids = self._ids, []
        for registered in ids:
            self._con.unregister_object(registered)
        self._exported.unwrap()
        # pydbus keeps wrapper and object as keys of dictionaries of its classes for ever.
        Exported.SignalEmitted.map.pop(self._exported, None)
        kind = type(self._target)
        names = [signal.name for interface in self._interfaces for signal in interface.signals]
        for name in [*names, "PropertiesChanged"]:
            signal = getattr(kind, name, None)
            if signal is not None:
                signal.map.pop(self._target, None)


def load_interfaces(xml: str) -> dict[str, Gio.DBusInterfaceInfo]:
    """The interfaces of an introspection document, by name."""
    return {interface.name: interface for interface in Gio.DBusNodeInfo.new_for_xml(xml).interfaces}


def _pack(types: Sequence[str], result: Any) -> tuple[GLib.Variant, Gio.UnixFDList | None]:
    """The reply's body and descriptors. A ready-made tuple variant is taken as it is."""
    if isinstance(result, GLib.Variant) and result.get_type_string() == f"({''.join(types)})":
        return result, None
    values = [] if not types else [result] if len(types) == 1 else list(result)
    if "h" not in types:
        return GLib.Variant(f"({''.join(types)})", tuple(values)), None
    attached = Gio.UnixFDList.new()
    handles = [index for index, kind in enumerate(types) if kind == "h"]
    fds = [values[index] for index in handles]
    try:
        for index, fd in zip(handles, fds, strict=True):
            values[index] = attached.append(fd)
    finally:
        for fd in fds:
            os.close(fd)
    return GLib.Variant(f"({''.join(types)})", tuple(values)), attached


if hasattr(Gio.DBusConnection, "register_object_with_closures2"):  # GLib 2.84

    def _release(_invocation: Gio.DBusMethodInvocation) -> None:
        """PyGObject and GLib agree here on who owns the invocation."""

else:
    # Before, GDBus gives one reference to the handler, and PyGObject never drops it: each call would leak
    # itself and its descriptors. Only 2.82.3 had the cure of 2.84 and lost it again in 2.82.4; there one
    # unref is one too many.
    if (GLib.MAJOR_VERSION, GLib.MINOR_VERSION, GLib.MICRO_VERSION) == (2, 82, 3):
        raise ImportError("GLib 2.82.3 counts references of D-Bus calls like no other version: use 2.82.4")
    _unref = ctypes.CDLL("libgobject-2.0.so.0").g_object_unref
    _unref.argtypes, _unref.restype = [ctypes.c_void_p], None

    def _release(_invocation: Gio.DBusMethodInvocation) -> None:
        """Drop the handler's reference, exactly once, after the reply."""
        _unref(hash(_invocation))  # the hash of a GObject in PyGObject is its address
