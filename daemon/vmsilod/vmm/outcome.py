"""How a VMM ended, in terms of the VM.

Made by the drivers' explain_exit from what systemd says of the unit's main process, and by endings.py for
what the VMM itself cannot tell; shown to the user, and read where a restart is decided.
"""

from __future__ import annotations

import enum
import signal as signals
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class OutcomeKind(enum.Enum):
    """The value is the machine code that D-Bus shows as LastOutcome."""

    STOPPED = "stopped"
    POWERED_OFF = "powered-off"
    RESET = "reset"
    CRASH = "crash"
    PANIC = "panic"
    BAD_ARGUMENTS = "bad-arguments"
    WATCHDOG = "watchdog"
    KILLED = "killed"
    KILLED_ON_REQUEST = "killed-on-request"
    FAILED = "failed"
    START_FAILED = "start-failed"
    OUT_OF_MEMORY = "out-of-memory"
    TIMEOUT = "timeout"


@dataclass(frozen=True)
class Outcome:
    """`message` is one line with the fact, `hint` says what to do about it."""

    kind: OutcomeKind
    message: str
    hint: str = ""

    @property
    def text(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


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
