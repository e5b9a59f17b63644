"""How each VM ended, and what follows, in this boot: /run/vmsilo/state/NAME.history.

Owned by endings.py. Unlike the record of a run it outlives the run, for restarts have a limit and people
ask later; it goes with the VM's configuration.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from vmsilod.errors import Failed
from vmsilod.resources.record import STATE_DIR
from vmsilod.state_file import save_json
from vmsilod.vmm.outcome import Outcome, OutcomeKind

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class History:
    """Times are seconds of CLOCK_BOOTTIME.

    `restarts`: when the VM was started again after a crash; `resets`: when its VMM was after a reboot of the
    guest; `due`: when the next start is; `last`: how the last run ended, `invocation`: which one that was;
    `admitted`: the invocation of the last start that was counted.
    """

    restarts: tuple[float, ...] = ()
    resets: tuple[float, ...] = ()
    due: float | None = None
    last: Outcome | None = None
    invocation: str = ""
    admitted: str = ""


EMPTY = History()


def save_history(name: str, history: History, directory: Path = STATE_DIR) -> None:
    """An empty one has no file."""
    path = directory / f"{name}.history"
    if history == EMPTY:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise Failed(f"cannot remove {path}: {error.strerror}") from error
        return
    last = history.last and {**asdict(history.last), "kind": history.last.kind.value}
    save_json(path, {**asdict(history), "last": last})


def load_histories(directory: Path = STATE_DIR) -> dict[str, History]:
    histories = {}
    for path in sorted(directory.glob("*.history")) if directory.is_dir() else ():
        try:
            content = json.loads(path.read_text())
            last = content["last"]
            histories[path.stem] = History(
                restarts=tuple(float(time) for time in content["restarts"]),
                resets=tuple(float(time) for time in content["resets"]),
                due=None if content["due"] is None else float(content["due"]),
                last=last and Outcome(OutcomeKind(last["kind"]), str(last["message"]), str(last["hint"])),
                invocation=str(content["invocation"]),
                admitted=str(content["admitted"]),
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.error("%s is not a history, ignoring it: %s", path, error)
    return histories
