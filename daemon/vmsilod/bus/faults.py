"""The log of refused and failed calls, rationed: any local user can make as many of them as they like.

Used by export.py, one line per failure. Lives as long as the service.
"""

from __future__ import annotations

import logging
import time

from vmsilod.errors import Kind, shown_error, wire_of

log = logging.getLogger(__name__)


class FaultLog:
    """At most `burst` lines in `seconds`; then one line that says how many were left out."""

    def __init__(self, burst: int = 20, seconds: float = 60) -> None:
        self._burst = burst
        self._seconds = seconds
        self._since = 0.0
        self._written = 0
        self._left_out = 0

    def report(self, error: BaseException, where: str, uid: int) -> None:
        shown = shown_error(error)
        kind = wire_of(shown).kind if shown is error else Kind.BUG
        if not log.isEnabledFor(kind.value) or not self._may_write():
            return
        with_trace = error if shown is not error else None
        log.log(kind.value, "%s of uid %d: %s", where, uid, shown.message, exc_info=with_trace)

    def _may_write(self) -> bool:
        now = time.monotonic()
        if now - self._since > self._seconds:
            if self._left_out:
                log.warning("%d failures of bus calls were not logged", self._left_out)
            self._since, self._written, self._left_out = now, 0, 0
        if self._written >= self._burst:
            self._left_out += 1
            return False
        self._written += 1
        return True
