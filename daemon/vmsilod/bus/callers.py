"""Who is at the other end: the uid of a connection, and the connections that get signals.

Signals name VMs, so they are not broadcast: each goes to the connections that have read something and were
allowed to. Both tables are bounded and forget a connection that has gone. Used by export.py and service.py
on the loop; lives as long as the bus connection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gi.repository import Gio, GLib

from vmsilod import loop
from vmsilod.errors import Denied

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

BUS = "org.freedesktop.DBus"
BUS_PATH = "/org/freedesktop/DBus"
BUS_TIMEOUT_MS = 10_000
KNOWN_MAX = 1024
# Each member costs one of the 512 match rules that the bus allows a connection.
AUDIENCE_MAX = 256


class Callers:
    """Uids by unique bus name, which the bus never uses twice."""

    def __init__(self, con: Gio.DBusConnection) -> None:
        self._con = con
        self._uids: dict[str, int] = {}

    async def find_uid(self, sender: str) -> int:
        """The uid of a connection; Denied if it has gone."""
        known = self._uids.get(sender)
        if known is not None:
            return known
        args = GLib.Variant("(s)", (sender,))
        try:
            (uid,), _ = await loop.dbus_call(
                self._con, BUS, BUS_PATH, BUS, "GetConnectionUnixUser", args, "(u)", BUS_TIMEOUT_MS
            )
        except GLib.Error as error:
            raise Denied("the bus does not know the caller") from error
        if len(self._uids) >= KNOWN_MAX:
            del self._uids[next(iter(self._uids))]
        self._uids[sender] = uid
        return int(uid)


@dataclass(frozen=True)
class Member:
    uid: int
    subscription: int


class Audience:
    """The connections that signals are sent to."""

    def __init__(self, con: Gio.DBusConnection) -> None:
        self._con = con
        self._members: dict[str, Member] = {}

    def admit(self, sender: str, uid: int) -> None:
        """From now on the connection gets signals, until it goes or is dropped.

        The longest-standing makes room.
        """
        if sender in self._members:
            return
        if len(self._members) >= AUDIENCE_MAX:
            self.drop(next(iter(self._members)))
        subscription = self._con.signal_subscribe(
            BUS, BUS, "NameOwnerChanged", BUS_PATH, sender, Gio.DBusSignalFlags.NONE, self._owner_changed
        )
        self._members[sender] = Member(uid, subscription)
        loop.spawn(self._drop_if_gone(sender))

    def drop(self, sender: str) -> None:
        member = self._members.pop(sender, None)
        if member is not None:
            self._con.signal_unsubscribe(member.subscription)

    def close(self) -> None:
        for sender in list(self._members):
            self.drop(sender)

    def emit(self, path: str, interface: str, signal: str, args: GLib.Variant) -> None:
        for sender in self._members:
            self._con.emit_signal(sender, path, interface, signal, args)

    async def review(self, may_see: Callable[[str, int], Awaitable[bool]]) -> None:
        """Drop whoever may see VMs no longer: for when the permissions may have changed."""
        for sender, member in list(self._members.items()):
            if not await may_see(sender, member.uid):
                self.drop(sender)

    async def _drop_if_gone(self, sender: str) -> None:
        """It may have gone before the subscription could hear of it."""
        args = GLib.Variant("(s)", (sender,))
        try:
            (there,), _ = await loop.dbus_call(
                self._con, BUS, BUS_PATH, BUS, "NameHasOwner", args, "(b)", BUS_TIMEOUT_MS
            )
        except GLib.Error:
            there = False
        if not there:
            self.drop(sender)

    def _owner_changed(self, *args: Any) -> None:
        name, _old, new = args[5].unpack()
        if not new:
            self.drop(name)
