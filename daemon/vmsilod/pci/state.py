"""What vmsilod knows of PCI devices that sysfs does not say: /run/vmsilo/state/devices/pci.json.

Owned by `claims`, which saves it before each change of the kernel's state, so that whatever a killed vmsilod
was doing can be found here and completed or undone. It counts for one boot only.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vmsilod.state_file import save_json

log = logging.getLogger(__name__)

STATE_FILE = Path("/run/vmsilo/state/devices/pci.json")  # state/pci.json is the record of a VM "pci"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass
class State:
    """All keys are addresses.

    pending: (driver, driver_override) from before a claim that is under way; held: the VM that has it;
    origin: the host's driver that had it; tainted: (VM that had it, why it is not clean); released: given
    back by a person, so not to be isolated again in this boot.
    """

    boot: str = ""
    pending: dict[str, tuple[str, str]] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    tainted: dict[str, tuple[str, str]] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)


def load_state(path: Path = STATE_FILE, boot_id: Path = BOOT_ID) -> State:
    """An empty one where there is none of this boot."""
    boot = boot_id.read_text().strip() if boot_id.exists() else ""
    try:
        content = json.loads(path.read_text())
        state = State(
            boot=str(content["boot"]),
            pending={str(k): (str(v[0]), str(v[1])) for k, v in content["pending"].items()},
            held={str(k): str(v) for k, v in content["held"].items()},
            origin={str(k): str(v) for k, v in content["origin"].items()},
            tainted={str(k): (str(v[0]), str(v[1])) for k, v in content["tainted"].items()},
            released=[str(k) for k in content["released"]],
        )
    except FileNotFoundError:
        return State(boot)
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        log.error("%s cannot be read, ignoring it: %s", path, error)
        return State(boot)
    return state if state.boot == boot else State(boot)


def save_state(state: State, path: Path = STATE_FILE) -> None:
    save_json(path, asdict(state))
