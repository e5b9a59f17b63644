"""The end of a run at once, whatever its guest thinks of it.

Called by the lifecycle, on the loop. What is to end is a run, not a VM: one that somebody starts meanwhile
lives.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from typing import TYPE_CHECKING

from vmsilod import loop
from vmsilod.errors import VmsiloError

if TYPE_CHECKING:
    from vmsilod.endings import Endings
    from vmsilod.registry import Vm
    from vmsilod.systemd import Systemd

log = logging.getLogger(__name__)


async def end_run(systemd: Systemd, endings: Endings, vm: Vm, grace: float) -> bool:
    """By SIGTERM, and `grace` seconds later by SIGKILL; False if none is up. Its end is told as asked for,
    unless this raises.
    """
    unit = vm.debug_service if vm.debug else vm.service
    await endings.mark_stopping(vm)
    state = await systemd.state(unit)  # after that: its guest may have reset it meanwhile
    if not state.is_up:
        return False
    vm.killing = state.invocation  # it stays: no other run is called that
    try:
        stopped = loop.spawn(systemd.stop(unit))
        with contextlib.suppress(TimeoutError):
            await loop.with_deadline(stopped, grace)
        # A start of somebody else's may have taken the place of the stop, not of what is to end.
        if not stopped.done() or stopped.result() != "done":
            await _kill(systemd, unit, state.invocation)
        await loop.wait_for(stopped)
    except VmsiloError:
        vm.killing = ""
        raise
    return True


async def _kill(systemd: Systemd, unit: str, invocation: str) -> None:
    try:
        state = await systemd.state(unit)
        if state.is_up and state.invocation == invocation:
            await systemd.kill(unit, signal.SIGKILL)
    except VmsiloError as error:
        log.info("%s: %s", unit, error)  # it ended between the two calls
