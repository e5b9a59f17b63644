"""Which bus connections are still there: a disposable lives for the connections of those who hold it.

A client keeps its connection open as long as its command runs. However it ends (kill -9, a closed terminal),
the kernel closes the connection and the bus says so; a bus name is never used twice, so that a later vmsilod
can ask for it. Used by keeper.py, on the loop; lives as long as the bus connection.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from gi.repository import Gio, GLib

from vmsilod import loop
from vmsilod.bus.callers import BUS, BUS_PATH, BUS_TIMEOUT_MS
from vmsilod.errors import Busy

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

# Each costs one of the 512 match rules that the bus allows a connection; the audience has 256.
LEASHES_MAX = 192


class Leashes:
    """`on_gone` of each watched name is called once, when its connection has gone."""

    def __init__(self, con: Gio.DBusConnection) -> None:
        self._con = con
        self._watched: dict[str, tuple[int, Callable[[str], None]]] = {}

    def require_room(self) -> None:
        if len(self._watched) >= LEASHES_MAX:
            raise Busy(f"{LEASHES_MAX} commands run in disposables already", "wait for some of them")

    def watch(self, name: str, on_gone: Callable[[str], None]) -> None:
        if name in self._watched:
            return
        subscription = self._con.signal_subscribe(
            BUS, BUS, "NameOwnerChanged", BUS_PATH, name, Gio.DBusSignalFlags.NONE, self._owner_changed
        )
        self._watched[name] = (subscription, on_gone)
        loop.spawn(self._ask(name))

    def drop(self, name: str) -> None:
        subscription, _ = self._watched.pop(name, (0, None))
        if subscription:
            self._con.signal_unsubscribe(subscription)

    async def _ask(self, name: str) -> None:
        """It may have gone before the subscription could hear of it."""
        args = GLib.Variant("(s)", (name,))
        try:
            (there,), _ = await loop.dbus_call(
                self._con, BUS, BUS_PATH, BUS, "NameHasOwner", args, "(b)", BUS_TIMEOUT_MS
            )
        except GLib.Error as error:
            log.warning("ignoring: the bus does not say whether %s is there: %s", name, error.message)
            return
        if not there:
            self._tell(name)

    def _owner_changed(self, *args: Any) -> None:
        name, _old, new = args[5].unpack()
        if not new:
            self._tell(name)

    def _tell(self, name: str) -> None:
        watched = self._watched.get(name)
        if watched is not None:
            self.drop(name)
            watched[1](name)
