"""Watches the configuration directories and says when something in them has changed.

Owned by main; it parses nothing. Directories are watched, not files: a file's watch ends with the first
atomic rename. After a lost event (queue overflow) everything counts as changed. Changes that come close
together are reported once.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gi.repository import GLib
from inotify_simple import INotify, flags

from vmsilod import loop

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.2
CONTENT = flags.CLOSE_WRITE | flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE | flags.CREATE | flags.ATTRIB
ARRIVAL = flags.CREATE | flags.MOVED_TO | flags.ONLYDIR
ITSELF = flags.DELETE_SELF | flags.MOVE_SELF | flags.ONLYDIR | flags.EXCL_UNLINK


class ConfigurationWatch:
    """Calls on_change() some tenths of a second after files below any of the roots changed."""

    def __init__(self, roots: Sequence[Path], on_change: Callable[[], None]) -> None:
        self._roots = roots
        self._on_change = on_change
        self._inotify = INotify(nonblocking=True)
        self._timer = 0
        self._watch = loop.watch_fd(self._inotify.fileno(), self._read)
        self.refresh()

    def close(self) -> None:
        GLib.source_remove(self._watch)
        self._inotify.close()

    def refresh(self) -> None:
        """Watch every directory that exists by now; watching one again changes nothing."""
        for root in self._roots:
            drop_ins = (*root.glob("*.toml.d"), *root.glob("vms.d/*.toml.d"))
            for directory in (root.parent, root, root / "vms.d", *drop_ins):
                try:
                    # /etc itself only tells when /etc/vmsilo comes or goes.
                    self._inotify.add_watch(
                        directory, ARRIVAL if directory == root.parent else CONTENT | ITSELF
                    )
                except FileNotFoundError:
                    continue
                except OSError as error:
                    log.warning("cannot watch %s: %s", directory, error.strerror)

    def _read(self) -> None:
        names = {root.name for root in self._roots}
        parents = [
            event for event in self._inotify.read(timeout=0) if event.name in names or self._is_below(event)
        ]
        if parents and not self._timer:
            self._timer = loop.call_later(SETTLE_SECONDS, self._fire)

    @staticmethod
    def _is_below(event: object) -> bool:
        name, mask = getattr(event, "name", ""), getattr(event, "mask", 0)
        return (
            not name
            or name.endswith((".toml", ".toml.d"))
            or name == "vms.d"
            or bool(mask & flags.Q_OVERFLOW)
        )

    def _fire(self) -> None:
        self._timer = 0
        self.refresh()
        self._on_change()
