"""What vmsilo took from the kernel's pool of huge pages, written down before it is taken.

Owned by the store. One file, replaced as a whole; in /run, so it ends with the boot as the pages do. From
it a vmsilod whose predecessor was killed at any moment finds how many pages it has to give back: while the
pool is being changed the entry says how large it was before. (Should somebody else change the pool in that
very moment, more than the entry's own pages is never given back.)
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vmsilod.state_file import save_json

log = logging.getLogger(__name__)

# Not *.json: those of that directory are VMs' lease records.
LEDGER_FILE = Path("/run/vmsilo/state/hugepages")


@dataclass(frozen=True)
class Entry:
    """Of one image version. growing: up to `pages` are being taken; held: `pages` were; shrinking: they are
    being given back. `before` is the pool's size (persistent pages) when the change began.
    """

    image: str
    version: str
    phase: Literal["growing", "held", "shrinking"]
    pages: int
    before: int = 0

    def count_taken(self, persistent: int) -> int:
        """How many pages are to be given back, with a pool that has `persistent` now."""
        if self.phase == "held":
            return self.pages
        start = self.before if self.phase == "growing" else self.before - self.pages
        return min(max(0, persistent - start), self.pages)


class Ledger:
    def __init__(self, path: Path = LEDGER_FILE) -> None:
        self._path = path

    def load(self) -> dict[tuple[str, str], Entry]:
        """By image and version."""
        try:
            entries = [Entry(**content) for content in json.loads(self._path.read_text())]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            log.error("%s cannot be read, ignoring it: %s", self._path, error)
            return {}
        return {(entry.image, entry.version): entry for entry in entries}

    def put(self, entry: Entry) -> None:
        self._save(self.load() | {(entry.image, entry.version): entry})

    def remove(self, entry: Entry) -> None:
        entries = self.load()
        entries.pop((entry.image, entry.version), None)
        self._save(entries)

    def _save(self, entries: dict[tuple[str, str], Entry]) -> None:
        save_json(self._path, [asdict(entry) for entry in entries.values()])
