"""The file of each disposable: /run/vmsilo/state/disposables/NAME.json, written before anything is acquired
for it and removed after all is given back.

Owned by keeper.py. With it a vmsilod that was killed at any moment finds at its next start whom to ask
for, and what to take away. Lives in /run: it ends with the boot.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from vmsilod.errors import Failed
from vmsilod.resources.record import STATE_DIR
from vmsilod.state_file import save_json, temporary_of

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

DIRECTORY = STATE_DIR / "disposables"


@dataclass(frozen=True)
class DisposableRecord:
    """`config` is the JSON of its VmConfig; `holders` are the bus names of the connections that it lives
    for; `uid` is the user's; `ended`: its one run is over.
    """

    name: str
    config: str
    uid: int
    holders: tuple[str, ...] = ()
    ended: bool = False


def save_record(record: DisposableRecord, directory: Path = DIRECTORY) -> None:
    save_json(directory / f"{record.name}.json", asdict(record))


def load_records(directory: Path = DIRECTORY) -> list[DisposableRecord]:
    """Every readable one; what cannot be read is removed, and its VM is then nobody's."""
    records = []
    for path in sorted(directory.glob("*.json")) if directory.is_dir() else ():
        try:
            content = json.loads(path.read_text())
            record = DisposableRecord(**{**content, "holders": tuple(content["holders"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.error("%s is not the record of a disposable: %s", path, error)
            path.unlink(missing_ok=True)
            continue
        records.append(record)
    return records


def forget_record(name: str, directory: Path = DIRECTORY) -> None:
    record = directory / f"{name}.json"
    for path in (record, temporary_of(record)):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise Failed(f"cannot remove {path}: {error.strerror}") from error
