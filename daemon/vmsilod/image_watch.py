"""Says when an image has another current version: a build, a roll-back, whoever moved the link.

Owned by main. It keeps `versions` (image -> name of its current version) as the links say. Directories are
watched, as a link appears by a rename. Changes that come close together are reported once; after a lost
event everything is read again.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gi.repository import GLib
from inotify_simple import INotify, flags
from vmsilo_image.recipe import NAME
from vmsilo_image.store import CURRENT, read_link

from vmsilod import loop

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.1
MOVES = flags.CREATE | flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE
ITSELF = flags.DELETE_SELF | flags.MOVE_SELF | flags.ONLYDIR


class ImageWatch:
    """Calls on_change() on the loop some tenths of a second after a current version has changed."""

    def __init__(self, images: Path, versions: dict[str, str], on_change: Callable[[], None]) -> None:
        self._images = images
        self._versions = versions
        self._on_change = on_change
        self._inotify = INotify(nonblocking=True)
        self._timer = 0
        self._source = loop.watch_fd(self._inotify.fileno(), self._read)
        self._refresh()

    def close(self) -> None:
        GLib.source_remove(self._source)
        if self._timer:
            GLib.source_remove(self._timer)
        self._inotify.close()

    def _refresh(self) -> bool:
        """Watch every image that exists by now; True if a current version is another than before."""
        self._add(self._images.parent)
        self._add(self._images)
        found = {}
        for folder in self._images.iterdir() if self._images.is_dir() else ():
            if NAME.fullmatch(folder.name):
                self._add(folder)
                if current := read_link(folder / CURRENT):
                    found[folder.name] = current
        changed = found != self._versions
        self._versions.clear()
        self._versions.update(found)
        return changed

    def _add(self, folder: Path) -> None:
        try:
            self._inotify.add_watch(folder, MOVES | ITSELF)
        except (FileNotFoundError, NotADirectoryError):
            pass  # it went while we looked: its parent has told so
        except OSError as error:
            log.warning("cannot watch %s: %s", folder, error.strerror)

    def _read(self) -> None:
        self._inotify.read(timeout=0)
        if not self._timer:
            self._timer = loop.call_later(SETTLE_SECONDS, self._fire)

    def _fire(self) -> None:
        self._timer = 0
        if self._refresh():
            self._on_change()
