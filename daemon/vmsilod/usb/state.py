"""What each running VM has of USB, kept on disk so that a vmsilod that was killed goes on with it.

Owned by the attachments. One file for all VMs, replaced as a whole; it lives in /run and so ends with the
boot. A VM's part counts for one run (systemd's invocation ID): when that ends, the kernel has taken
everything back.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsilod.state_file import save_json
from vmsilod.usb.rules import UsbRule

if TYPE_CHECKING:
    from vmsilod.usb.devices import Key

log = logging.getLogger(__name__)

# Not *.json: those of that directory are VMs' lease records.
STATE_FILE = Path("/run/vmsilo/state/usb-attached")


@dataclass(frozen=True)
class Attachment:
    """A device in a VM: the VMM's handle, and what tells that plugging in from others."""

    handle: str
    name: str
    devnum: int
    instance: int
    ids: str

    @property
    def key(self) -> Key:
        return self.name, self.devnum, self.instance


@dataclass
class UsbRun:
    """One run of a VM: `wanted` was attached by hand and `refused` detached by hand since it started.

    `sent` are devices whose descriptor its VMM was sent and should have closed since: usbfs cannot take one
    back, so a VMM that was taken over has them until the run ends or the device is plugged in anew.
    """

    invocation: str
    attached: list[Attachment] = field(default_factory=list)
    wanted: list[UsbRule] = field(default_factory=list)
    refused: list[UsbRule] = field(default_factory=list)
    sent: list[Key] = field(default_factory=list)

    def let_go(self, attachment: Attachment) -> None:
        self.attached.remove(attachment)
        self.mark_sent(attachment.key)

    def mark_sent(self, key: Key) -> None:
        if key not in self.sent:
            self.sent.append(key)


def as_content(runs: dict[str, UsbRun]) -> dict[str, Any]:
    """What is worth writing down, as JSON's types."""
    return {
        name: asdict(run)
        for name, run in runs.items()
        if run.attached or run.wanted or run.refused or run.sent
    }


def save_state(content: dict[str, Any], path: Path = STATE_FILE) -> None:
    """`content` is of as_content."""
    save_json(path, content)


def load_state(path: Path = STATE_FILE) -> dict[str, UsbRun]:
    """Empty where nothing can be made of the file: then the VMMs are asked what they have."""
    try:
        return {name: _parse_run(run) for name, run in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.error("%s cannot be read, ignoring it: %s", path, error)
        return {}


def _parse_run(content: dict[str, Any]) -> UsbRun:
    return UsbRun(
        content["invocation"],
        [Attachment(**entry) for entry in content["attached"]],
        [UsbRule(**entry) for entry in content["wanted"]],
        [UsbRule(**entry) for entry in content["refused"]],
        [(str(name), int(devnum), int(instance)) for name, devnum, instance in content["sent"]],
    )
