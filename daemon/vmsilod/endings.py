"""How the run of a VM ended, and what follows from it: the telling, the history, the start again.

Wired up by main. Told by runs and lifecycle of every start and every end; starts units itself where the
configuration asks for it (`restart`), never for a VM that somebody stopped. Nothing here is known to it
alone: what must survive it is in the history's file before it acts.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from typing import TYPE_CHECKING

from gi.repository import GLib

from vmsilod import loop
from vmsilod.errors import VmsiloError
from vmsilod.first_sign import await_main_loop
from vmsilod.resources import history as histories
from vmsilod.resources import record as records
from vmsilod.resources import rundir
from vmsilod.resources.history import EMPTY, History
from vmsilod.restart import Decision, decide, find_recent, plan_reset
from vmsilod.vmm import drivers
from vmsilod.vmm.choose import VmmKind
from vmsilod.vmm.outcome import Outcome, OutcomeKind
from vmsilod.waiting import Lock

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmsilod.registry import Registry, Vm
    from vmsilod.systemd import Systemd, UnitState

log = logging.getLogger(__name__)

KEPT_RESETS = 20
LONGEST_WINDOW = 86400  # seconds; what the configuration's `within` may be at most
_LEVELS = {
    OutcomeKind.STOPPED: logging.INFO,
    OutcomeKind.POWERED_OFF: logging.INFO,
    OutcomeKind.RESET: logging.INFO,
    OutcomeKind.KILLED_ON_REQUEST: logging.INFO,
    OutcomeKind.TIMEOUT: logging.WARNING,
    OutcomeKind.START_FAILED: logging.WARNING,  # systemd or the launcher has said it as an error
}
KILLED = Outcome(OutcomeKind.KILLED_ON_REQUEST, "killed on request")
# What systemd knows better than an exit status does: its `Result` of the unit.
_BY_RESULT = {
    "oom-kill": Outcome(
        OutcomeKind.OUT_OF_MEMORY,
        "the kernel killed the VMM because memory ran out",
        "the host needs more, the unit a higher MemoryMax=, or the VM less `memory`",
    ),
    "timeout": Outcome(OutcomeKind.TIMEOUT, "the guest did not shut down in time and was killed"),
    "watchdog": Outcome(OutcomeKind.WATCHDOG, "the watchdog of the VM's unit ran out"),
    "resources": Outcome(OutcomeKind.FAILED, "systemd had no resources for the VM's unit"),
}


class Endings:
    """Of all VMs. `on_change` is called where what a VM shows has changed."""

    def __init__(self, registry: Registry, systemd: Systemd, on_change: Callable[[Vm], None]) -> None:
        self._registry = registry
        self._systemd = systemd
        self._on_change = on_change
        self._histories: dict[str, History] = {}
        self._timers: dict[str, int] = {}
        self._resumed = False  # before that, nobody knows who is configured
        self._saving = Lock()

    async def load(self) -> None:
        """At start, before any end is told."""
        self._histories = await loop.in_worker(histories.load_histories)

    async def resume(self) -> None:
        """At start, when configuration and units are known: go on where the last vmsilod was."""
        self._resumed = True
        for name in list(self._histories):
            vm = self._registry.find(name)
            if vm is None:
                await self.forget(name)
                continue
            history = self._histories[name]
            if vm.last is None:
                vm.last = history.last
            if history.due is not None and vm.is_up:
                await self._save(vm.name, due=None)
            elif history.due is not None:
                self._arm(vm, history.due)
            self._on_change(vm)
        for vm in self._registry:
            if vm.is_up:
                self.watch(vm)

    # A start

    async def admit(self, vm: Vm, unit: str, pid: int) -> None:
        """Called for every launcher, before anything is prepared for it; holds up a guest that does nothing
        but reboot.
        """
        state = await self._systemd.state(unit)
        if state.active != "activating" or state.main_pid != pid:
            return  # refused by whoever prepares
        self._disarm(vm)
        history = self._history(vm.name)
        if history.admitted == state.invocation:
            return  # asked again, because the last vmsilod died before it answered
        if not state.restarts:
            # A start that takes the place of a planned one is that one. Any other is somebody's fresh start.
            kept = history.restarts if history.due is not None else ()
            await self._save(vm.name, due=None, restarts=kept, resets=(), admitted=state.invocation)
            return
        now = clock()
        resets = (*history.resets, now)[-KEPT_RESETS:]
        delay = plan_reset(resets, now)
        vm.last = Outcome(OutcomeKind.RESET, "the guest rebooted")
        self._log(vm, vm.last, f"its VMM starts in {delay:.0f} s: it reboots all the time" if delay else "")
        await self._save(vm.name, resets=resets, last=vm.last, admitted=state.invocation)
        if delay:
            await loop.after(delay)

    async def start_failed(self, vm: Vm, invocation: str, error: VmsiloError) -> None:
        """vmsilod has refused this start; the launcher and the control socket log it. If its run has ended
        meanwhile, that was why.
        """
        if self._history(vm.name).invocation == invocation:
            return
        killed = vm.killing == invocation
        vm.last = KILLED if killed else Outcome(OutcomeKind.START_FAILED, error.message, error.hint)
        await self._save(vm.name, last=vm.last, invocation=invocation)

    def watch(self, vm: Vm) -> None:
        """Note when the VMM has got as far as running the guest, where its exit status would not tell."""
        record = vm.record
        if record is None or not record.launched or record.ran:
            return
        if drivers.DRIVERS[VmmKind(record.vmm)].speaks_when_running:
            loop.spawn(self._watch(vm, record.invocation))

    async def _watch(self, vm: Vm, invocation: str) -> None:
        if not await await_main_loop(rundir.VM_DIR / vm.name / "monitor.sock"):
            return
        async with vm.lock:
            if vm.record is not None and vm.record.invocation == invocation:
                vm.record = dataclasses.replace(vm.record, ran=True)
                await loop.in_worker(records.save_record, vm.record)

    # An end

    async def mark_stopping(self, vm: Vm) -> None:
        """Somebody wants this run to end: however it does, nothing starts it again."""
        if vm.record is None or vm.record.stopping or vm.lock.held:
            return
        async with vm.lock:
            vm.record = dataclasses.replace(vm.record, stopping=True)
            await loop.in_worker(records.save_record, vm.record)

    def find_told(self, vm: Vm) -> str:
        """The invocation of its last run whose end has been told, "" if there is none."""
        return self._history(vm.name).invocation

    async def tell(self, vm: Vm) -> None:
        """Once for each run that has ended, while its record is still there."""
        unit, record = vm.unit, vm.record
        invocation = unit.invocation or (record.invocation if record is not None else "")
        history = self._history(vm.name)
        if not invocation or invocation == history.invocation:
            return
        if record is not None and record.invocation != invocation:
            return  # systemd has a later run, which is told by itself, in this one's place
        vm.last = outcome = explain(vm, unit, killed=vm.killing == invocation)
        now = clock()
        decision = self._decide(vm, outcome, history, now)
        self._log(vm, outcome, decision.message)
        if decision.delay is None:
            if decision.message:
                vm.last = dataclasses.replace(outcome, message=f"{outcome.message}; {decision.message}")
            await self._save(vm.name, last=vm.last, invocation=invocation, due=None)
            return
        kept = find_recent(history.restarts, now, LONGEST_WINDOW)
        due = now + decision.delay
        await self._save(
            vm.name, last=outcome, invocation=invocation, restarts=(*kept, now), resets=(), due=due
        )
        if self._resumed and self._history(vm.name).due == due:  # nobody has cancelled it meanwhile
            self._arm(vm, due)

    @staticmethod
    def _decide(vm: Vm, outcome: Outcome, history: History, now: float) -> Decision:
        # While vmsilod starts, what the VM was started with has to do.
        config = vm.config or vm.started
        if vm.record is None or vm.record.stopping or vm.debug or config is None:
            return Decision(None)
        return decide(outcome, history.restarts, config.restart, now)

    async def cancel(self, vm: Vm) -> None:
        """Somebody starts or stops the VM: from here on it is theirs, and nothing counts that was before."""
        self._disarm(vm)
        await self._save(vm.name, restarts=(), resets=(), due=None)

    async def forget(self, name: str) -> None:
        """The VM is gone for good."""
        source = self._timers.pop(name, None)
        if source is not None:
            GLib.source_remove(source)
        if self._histories.pop(name, None) is not None:
            await self._write(name)

    # The start again

    def _arm(self, vm: Vm, due: float) -> None:
        self._disarm(vm)
        delay = max(0.0, due - clock())
        vm.planned = f"starts again in {delay:.0f} s"
        self._timers[vm.name] = loop.call_later(delay, lambda: loop.spawn(self._start_again(vm)))

    def _disarm(self, vm: Vm) -> None:
        source = self._timers.pop(vm.name, None)
        if source is not None:
            GLib.source_remove(source)
        if vm.planned:
            vm.planned = ""
            self._on_change(vm)

    async def _start_again(self, vm: Vm) -> None:
        self._timers.pop(vm.name, None)
        try:
            if await self._is_hindered(vm):
                return
            result = await self._systemd.start(vm.service)
            if result != "done":  # "canceled": somebody stopped it meanwhile
                level = logging.INFO if result == "canceled" else logging.WARNING
                log.log(level, "VM %s: was to be started again, but systemd says '%s'", vm.name, result)
        except VmsiloError as error:
            log.warning("VM %s: cannot be started again: %s", vm.name, error)
        finally:
            vm.planned = ""
            # The start has taken it back, if it came as far as being admitted.
            if vm.name not in self._timers and self._history(vm.name).due is not None:
                await self._save(vm.name, due=None)
            self._on_change(vm)

    async def _is_hindered(self, vm: Vm) -> bool:
        if await self._systemd.is_stopping():
            log.info("VM %s: not started again, the host shuts down", vm.name)
            return True
        # Asked last: whoever took it over or removed it did so before here, or comes after the start.
        gone = self._registry.find(vm.name) is not vm or vm.config is None
        return gone or vm.is_up or vm.debug or self._history(vm.name).due is None

    # The history

    def _history(self, name: str) -> History:
        return self._histories.get(name, EMPTY)

    async def _save(self, name: str, **changes: object) -> None:
        old = self._history(name)
        new = dataclasses.replace(old, **changes)  # type: ignore[arg-type]  # names and types are History's
        if new == old:
            return
        self._histories[name] = new
        await self._write(name)

    async def _write(self, name: str) -> None:
        """One at a time, and always the newest: workers may overtake each other."""
        async with self._saving:
            try:
                await loop.in_worker(histories.save_history, name, self._history(name))
            except VmsiloError as error:
                log.error("VM %s: %s", name, error)

    @staticmethod
    def _log(vm: Vm, outcome: Outcome, decision: str) -> None:
        """OBJECT_SYSTEMD_UNIT= puts the line into `systemctl status` and the unit's own journal."""
        text = f"{outcome.text}; {decision}" if decision else outcome.text
        fields = {
            "OBJECT_SYSTEMD_UNIT": unit_of(vm),
            "VMSILO_VM": vm.name,
            "VMSILO_OUTCOME": outcome.kind.value,
        }
        log.log(_LEVELS.get(outcome.kind, logging.ERROR), "VM %s: %s", vm.name, text, extra=fields)


def clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def explain(vm: Vm, unit: UnitState, *, killed: bool) -> Outcome:
    """How the run ended that systemd tells of."""
    record = vm.record
    if killed:
        return KILLED
    if vm.lost_share:
        return Outcome(OutcomeKind.CRASH, vm.lost_share, f"journalctl -t vmsilo-{vm.name}-share")
    if record is None or not record.launched:
        return Outcome(
            OutcomeKind.START_FAILED,
            f"the start did not get as far as the VMM (systemd's result: {unit.result})",
            f"journalctl -b -u {unit_of(vm)}",
        )
    if unit.result in _BY_RESULT:
        return _BY_RESULT[unit.result]
    if not unit.exit_code:  # systemd has let go of a unit that ended well
        return Outcome(OutcomeKind.STOPPED, "the VM was stopped")
    exited = unit.exit_code == os.CLD_EXITED
    outcome = drivers.DRIVERS[VmmKind(record.vmm)].explain_exit(
        unit.exit_status if exited else None,
        None if exited else unit.exit_status,
        guest_ran=vm.agent or record.ran,
    )
    if unit.result != "success":
        return outcome
    if record.stopping or outcome.kind is OutcomeKind.KILLED:
        return Outcome(OutcomeKind.STOPPED, "the VM was stopped")
    if outcome.kind is OutcomeKind.STOPPED:
        return Outcome(OutcomeKind.POWERED_OFF, "the guest powered off")
    return outcome


def unit_of(vm: Vm) -> str:
    return vm.debug_service if vm.debug else vm.service
