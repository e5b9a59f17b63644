"""The lease record of each running VM: /run/vmsilo/state/NAME.json, written before anything is acquired.

Owned by the lifecycle. What a VM holds can be found again from its record alone, so a daemon that was killed
at any moment finds on its next start what to keep and what to give back. Lives in /run: it ends with the
boot.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from vmsilod.state_file import save_json

log = logging.getLogger(__name__)

STATE_DIR = Path("/run/vmsilo/state")


@dataclass(frozen=True)
class Record:
    """One VM's lease: `invocation` is systemd's INVOCATION_ID of the unit run that holds it; `config` is
    the JSON of the configuration that it was started with, `login` and `guest_uid` the guest's user,
    `version` that of its image ("" before it has any files, "custom" if none of them is the image's).
    `ran`: the VMM has got as far as running the guest; `stopping`: somebody asked for the end; `hugepages`:
    IMAGE/VERSION of the image that it uses or is about to use in huge pages; `disks`: of each that it has
    (resources.disk_keys.key_of), whether it writes, in the order of the VMM's command line, its root first;
    `backings`: the same of what these are made of; `root_pmem`: the root is persistent memory and no disk of
    the VMM's.
    """

    name: str
    unit: str
    invocation: str
    vmm: str = "qemu"
    uid: int = 0
    cid: int = 0
    hybrid: bool = False
    config: str = ""
    launched: bool = False
    login: str = "user"
    version: str = ""
    guest_uid: int = 1000
    ran: bool = False
    stopping: bool = False
    hugepages: str = ""
    disks: dict[str, bool] = field(default_factory=dict)
    backings: dict[str, bool] = field(default_factory=dict)
    root_pmem: bool = False


def save_record(record: Record, directory: Path = STATE_DIR) -> None:
    save_json(directory / f"{record.name}.json", asdict(record))


def load_records(directory: Path = STATE_DIR) -> dict[str, Record]:
    """Every readable record, an older version's too; a half-written one (never renamed) does not count."""
    records = {}
    for path in sorted(directory.glob("*.json")) if directory.is_dir() else ():
        try:
            known = {each.name for each in fields(Record)}
            content = {key: value for key, value in json.loads(path.read_text()).items() if key in known}
            record = Record(**content)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.error("%s is not a record, ignoring it: %s", path, error)
            continue
        records[record.name] = record
    return records


def forget_record(name: str, directory: Path = STATE_DIR) -> None:
    (directory / f"{name}.json").unlink(missing_ok=True)
