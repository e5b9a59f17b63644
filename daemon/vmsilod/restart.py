"""Whether a VM that has ended is started again, and when: pure functions of how it ended and of what went
before.

Called by endings.py, which keeps the history and acts. Times are seconds of CLOCK_BOOTTIME, so that a
history outlives the daemon but not the boot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsilod.vmm.outcome import OutcomeKind

if TYPE_CHECKING:
    from vmsilod.config.schema import RestartPolicy
    from vmsilod.vmm.outcome import Outcome

# KILLED: by a signal that is no polite request and not vmsilo's, such as that of a user-space OOM killer.
CRASHES = frozenset(
    {
        OutcomeKind.PANIC,
        OutcomeKind.CRASH,
        OutcomeKind.WATCHDOG,
        OutcomeKind.OUT_OF_MEMORY,
        OutcomeKind.KILLED,
    }
)
FIRST_DELAY = 1.0  # seconds, doubled by every restart that still counts
LONGEST_DELAY = 30.0
FREE_RESETS = 5  # reboots of a guest within RESET_WINDOW seconds that are not slowed down
RESET_WINDOW = 60.0


@dataclass(frozen=True)
class Decision:
    """`delay` in seconds, None: the VM stays down. `message` says so, "" where nobody asked for restarts."""

    delay: float | None
    message: str = ""


def decide(outcome: Outcome, restarts: tuple[float, ...], policy: RestartPolicy, now: float) -> Decision:
    """`restarts`: when the VM was started again because of this policy."""
    if policy.policy == "no" or outcome.kind not in CRASHES:
        return Decision(None)
    recent = find_recent(restarts, now, policy.within)
    if len(recent) >= policy.limit:
        made = "1 restart" if len(recent) == 1 else f"{len(recent)} restarts"
        return Decision(None, f"not started again after {made} within {policy.within} s")
    delay = double(len(recent))
    return Decision(delay, f"starts again in {delay:.0f} s ({len(recent) + 1} of {policy.limit})")


def plan_reset(resets: tuple[float, ...], now: float) -> float:
    """Seconds to wait before a guest that rebooted gets its next VMM: one that does nothing else must not
    keep the host busy.
    """
    over = len(find_recent(resets, now, RESET_WINDOW)) - FREE_RESETS
    return double(over - 1) if over > 0 else 0.0


def find_recent(times: tuple[float, ...], now: float, within: float) -> tuple[float, ...]:
    return tuple(time for time in times if now - within < time <= now)


def double(steps: int) -> float:
    return float(min(FIRST_DELAY * 2 ** min(steps, 16), LONGEST_DELAY))
