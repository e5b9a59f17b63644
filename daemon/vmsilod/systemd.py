"""The part of systemd's D-Bus interface that vmsilod uses: unit starts and stops as jobs, unit properties,
change signals.

Called by the lifecycle on the GLib loop; every call is asynchronous. It never decides anything about a VM.
Lives as long as the bus connection.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gi.repository import Gio, GLib

from vmsilod import loop
from vmsilod.errors import Failed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

NAME = "org.freedesktop.systemd1"
PATH = "/org/freedesktop/systemd1"
MANAGER = "org.freedesktop.systemd1.Manager"
UNIT = "org.freedesktop.systemd1.Unit"
SERVICE = "org.freedesktop.systemd1.Service"
PROPERTIES = "org.freedesktop.DBus.Properties"
CALL_TIMEOUT_MS = 25_000
RELOAD_TIMEOUT_MS = 120_000
"""systemd answers nothing while it reads all units and the generators run: a minute on a slow, busy host."""


class NotLoaded(Failed):
    """systemd knows no such unit (any more): it has no file and nothing of it is left."""


@dataclass(frozen=True)
class UnitState:
    """What systemd says of one service. `exit_code` is a CLD_* code, `exit_status` a status or signal;
    times in microseconds.
    """

    active: str
    sub: str
    result: str = "success"
    main_pid: int = 0
    exit_code: int = 0
    exit_status: int = 0
    invocation: str = ""
    active_since: int = 0
    restarts: int = 0
    """Starts in a row that systemd made by itself (Restart...=); 0 again after anybody else's."""

    @property
    def is_up(self) -> bool:
        return self.active in ("activating", "active", "deactivating", "reloading")


INACTIVE = UnitState("inactive", "dead")
UNIT_STATE = ("ActiveState", "SubState", "InvocationID", "ActiveEnterTimestamp")
SERVICE_STATE = ("Result", "MainPID", "ExecMainCode", "ExecMainStatus", "NRestarts")
UNIT_SIGNAL = ("ActiveState", "SubState", "InvocationID", "StateChangeTimestampMonotonic")


def unit_path(unit: str) -> str:
    return f"{PATH}/unit/{escape_label(unit)}"


def escape_label(text: str) -> str:
    """One part of an object path: every byte but ASCII letters and digits as _xx (sd_bus_path_encode(3))."""
    if not text:
        return "_"
    out = []
    for index, byte in enumerate(text.encode()):
        char = chr(byte)
        plain = byte < 0x80 and (char.isalpha() or (char.isdigit() and index > 0))
        out.append(char if plain else f"_{byte:02x}")
    return "".join(out)


class Systemd:
    """One subscription to the service manager on an existing bus connection."""

    def __init__(self, con: Gio.DBusConnection, on_unit: Callable[[str], None]) -> None:
        self._con = con
        self._on_unit = on_unit
        self._jobs: dict[str, Future[str]] = {}
        self._early: dict[str, str] = {}
        self._starting = 0
        self._paths: dict[str, str] = {}
        self._told: dict[str, dict[str, Any]] = {}  # what systemd said last of a unit that is followed
        self._subscriptions = [
            con.signal_subscribe(
                NAME, MANAGER, "JobRemoved", PATH, None, Gio.DBusSignalFlags.NONE, self._job_removed
            ),
            con.signal_subscribe(
                NAME, PROPERTIES, "PropertiesChanged", None, UNIT, Gio.DBusSignalFlags.NONE, self._changed
            ),
        ]

    def close(self) -> None:
        for subscription in self._subscriptions:
            self._con.signal_unsubscribe(subscription)
        self._subscriptions = []

    async def subscribe(self) -> None:
        await self._call("Subscribe", None)

    def follow(self, unit: str) -> None:
        """Call on_unit(unit) whenever systemd reports a change of this unit."""
        self._paths[unit_path(unit)] = unit

    def unfollow(self, unit: str) -> None:
        self._paths.pop(unit_path(unit), None)
        self._told.pop(unit, None)

    async def reload(self) -> None:
        await self._call("Reload", None)

    async def start(self, unit: str) -> str:
        """Start a unit and wait for the job; returns systemd's job result ("done", "failed",
        "dependency", ...).
        """
        return await self._job("StartUnit", unit)

    async def start_bound(self, unit: str) -> str:
        """As start, for a unit that is bound to a VM's (BindsTo=): it starts for a VM that starts, and never
        starts one that somebody has stopped meanwhile, but is stopped at once itself.
        """
        return await self._job("StartUnit", unit, mode="ignore-requirements")

    async def stop(self, unit: str) -> str:
        try:
            return await self._job("StopUnit", unit)
        except NotLoaded:
            return "done"

    async def kill(self, unit: str, signal: int) -> None:
        await self._call("KillUnit", GLib.Variant("(ssi)", (unit, "all", signal)))

    async def reset_failed(self, unit: str) -> None:
        """Nothing to do for a unit that was collected (CollectMode=) when it failed."""
        try:
            await self._call("ResetFailedUnit", GLib.Variant("(s)", (unit,)))
        except NotLoaded as error:
            log.debug("ignoring: %s", error)

    async def find_units(self, pattern: str) -> list[tuple[str, str]]:
        """(unit, active state) of every loaded unit whose name matches the glob."""
        args = GLib.Variant("(asas)", ([], [pattern]))
        (units,) = await self._call("ListUnitsByPatterns", args)
        return [(row[0], row[3]) for row in units]

    async def state(self, unit: str) -> UnitState:
        path = unit_path(unit)
        try:
            general = await self._properties(path, UNIT, UNIT_STATE)
            service = await self._properties(path, SERVICE, SERVICE_STATE)
        except GLib.Error as error:
            if error.matches(Gio.dbus_error_quark(), Gio.DBusError.UNKNOWN_OBJECT):
                return INACTIVE
            raise Failed(f"systemd does not answer for {unit}: {error.message}") from error
        return UnitState(
            active=general["ActiveState"],
            sub=general["SubState"],
            result=service.get("Result", "success"),
            main_pid=service.get("MainPID", 0),
            exit_code=service.get("ExecMainCode", 0),
            exit_status=service.get("ExecMainStatus", 0),
            invocation=bytes(general["InvocationID"]).hex(),
            active_since=general["ActiveEnterTimestamp"],
            restarts=service.get("NRestarts", 0),
        )

    async def is_stopping(self) -> bool:
        """The host is shutting down."""
        args = GLib.Variant("(ss)", (MANAGER, "SystemState"))
        try:
            (state,), _ = await loop.dbus_call(
                self._con, NAME, PATH, PROPERTIES, "Get", args, "(v)", CALL_TIMEOUT_MS
            )
        except GLib.Error as error:
            raise Failed(f"systemd does not say whether the host shuts down: {error.message}") from error
        return bool(state == "stopping")

    async def _properties(self, path: str, iface: str, wanted: Sequence[str]) -> dict[str, Any]:
        """Those that there are; systemd has hundreds, and unpacking all of them costs milliseconds."""
        args = GLib.Variant("(s)", (iface,))
        reply, _ = await loop.dbus_reply(
            self._con, NAME, path, PROPERTIES, "GetAll", args, "(a{sv})", CALL_TIMEOUT_MS
        )
        return _pick(reply.get_child_value(0), wanted)

    async def _job(self, method: str, unit: str, mode: str = "replace") -> str:
        # JobRemoved may arrive before the reply that names the job: results are kept while any start is
        # under way.
        self._starting += 1
        try:
            (job,) = await self._call(method, GLib.Variant("(ss)", (unit, mode)))
            if job in self._early:
                return self._early[job]
            # Two callers who want the same of one unit at the same time are given the same job.
            future = self._jobs.setdefault(job, Future())
        finally:
            self._starting -= 1
            if not self._starting:
                self._early.clear()
        return await loop.wait_for(future)

    async def _call(self, method: str, args: Any) -> tuple[Any, ...]:
        timeout = RELOAD_TIMEOUT_MS if method == "Reload" else CALL_TIMEOUT_MS
        try:
            values, _ = await loop.dbus_call(self._con, NAME, PATH, MANAGER, method, args, None, timeout)
        except GLib.Error as error:
            absent = Gio.dbus_error_get_remote_error(error) == "org.freedesktop.systemd1.NoSuchUnit"
            raise (NotLoaded if absent else Failed)(f"systemd refused {method}: {error.message}") from error
        return tuple(values)

    def _job_removed(self, *args: Any) -> None:
        _, job, _, result = args[5].unpack()
        # Also when a caller waits: another may be given the same job by a reply that is still to be read.
        if self._starting:
            self._early[job] = result
        future = self._jobs.pop(job, None)
        if future is not None:
            future.set_result(result)

    def _changed(self, *args: Any) -> None:
        unit = self._paths.get(args[2])
        if unit is None:
            return
        # systemd tells all whenever one has changed: the status text of a service too, which is the guest's.
        state = _pick(args[5].get_child_value(1), UNIT_SIGNAL)
        if len(state) == len(UNIT_SIGNAL) and self._told.get(unit) == state:
            return
        self._told[unit] = state
        self._on_unit(unit)


def _pick(values: GLib.Variant, wanted: Sequence[str]) -> dict[str, Any]:
    """Of an a{sv}."""
    found = ((name, values.lookup_value(name, None)) for name in wanted)
    return {name: value.unpack() for name, value in found if value is not None}
