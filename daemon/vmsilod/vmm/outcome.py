"""How a VMM ended, in terms of the VM.

Made by the drivers' explain_exit from what systemd says of the unit's main process; read by the lifecycle
and shown to the user.
"""

from __future__ import annotations

import enum
import signal as signals
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class OutcomeKind(enum.Enum):
    STOPPED = "stopped"
    RESET = "reset"
    CRASH = "crash"
    PANIC = "panic"
    BAD_ARGUMENTS = "bad-arguments"
    WATCHDOG = "watchdog"
    KILLED = "killed"
    FAILED = "failed"


@dataclass(frozen=True)
class Outcome:
    kind: OutcomeKind
    message: str


_ORDERED = {signals.SIGKILL, signals.SIGTERM, signals.SIGINT, signals.SIGHUP, signals.SIGQUIT}


def explain_signal(vmm: str, number: int, causes: Mapping[int, str]) -> Outcome:
    """`causes` says for a VMM what a signal most often means there."""
    name = (
        signals.Signals(number).name if number in {s.value for s in signals.Signals} else f"signal {number}"
    )
    if number in _ORDERED:
        return Outcome(OutcomeKind.KILLED, f"{vmm} was killed ({name})")
    cause = f": {causes[number]}" if number in causes else ""
    return Outcome(OutcomeKind.CRASH, f"{vmm} crashed ({name}){cause}")
