"""Which ends lead to another start, and when."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from vmsilod.config.schema import RestartPolicy, VmFile
from vmsilod.endings import explain
from vmsilod.errors import Failed
from vmsilod.registry import Vm
from vmsilod.resources.history import EMPTY, History, load_histories, save_history
from vmsilod.resources.record import Record
from vmsilod.restart import FREE_RESETS, LONGEST_DELAY, decide, plan_reset
from vmsilod.systemd import UnitState
from vmsilod.vmm.outcome import Outcome, OutcomeKind

if TYPE_CHECKING:
    from pathlib import Path

ON_CRASH = RestartPolicy(policy="on-crash", limit=3, within=600)
CRASHES = {"panic", "crash", "watchdog", "out-of-memory", "killed"}
NOW = 10_000.0


def outcome(kind: OutcomeKind = OutcomeKind.PANIC) -> Outcome:
    return Outcome(kind, "it ended")


@pytest.mark.parametrize("kind", OutcomeKind)
def test_only_crashes_are_started_again(kind: OutcomeKind) -> None:
    assert (decide(outcome(kind), (), ON_CRASH, NOW).delay is not None) == (kind.value in CRASHES)
    assert decide(outcome(kind), (), RestartPolicy(), NOW).delay is None


def test_the_delay_grows_and_the_limit_holds() -> None:
    restarts: tuple[float, ...] = ()
    delays = []
    while (decision := decide(outcome(), restarts, ON_CRASH, NOW)).delay is not None:
        delays.append(decision.delay)
        restarts = (*restarts, NOW)
    assert delays == [1.0, 2.0, 4.0]
    assert decision.message == "not started again after 3 restarts within 600 s"


def test_old_restarts_do_not_count() -> None:
    old = (NOW - 601, NOW - 600.5, NOW - 599)
    assert decide(outcome(), old, ON_CRASH, NOW).delay == 2.0
    # A clock that went backwards is that of another boot.
    assert decide(outcome(), (NOW + 5,) * 3, ON_CRASH, NOW).delay == 1.0


def test_the_delay_has_an_end() -> None:
    policy = RestartPolicy(policy="on-crash", limit=100)
    assert decide(outcome(), (NOW,) * 99, policy, NOW).delay == LONGEST_DELAY


def test_a_guest_that_only_reboots_is_slowed_down() -> None:
    assert plan_reset((NOW,) * FREE_RESETS, NOW) == 0
    assert [plan_reset((NOW,) * (FREE_RESETS + more), NOW) for more in (1, 2, 3)] == [1, 2, 4]
    assert plan_reset((NOW,) * 20, NOW) == LONGEST_DELAY
    assert plan_reset((NOW - 61,) * 20, NOW) == 0


@pytest.mark.parametrize(
    ("value", "policy"),
    [
        ("no", RestartPolicy()),
        ("on-crash", ON_CRASH),
        ({"policy": "on-crash", "limit": 1}, RestartPolicy(policy="on-crash", limit=1)),
    ],
)
def test_configuration(value: object, policy: RestartPolicy) -> None:
    assert VmFile.model_validate({"name": "a", "restart": value}).restart == policy


@pytest.mark.parametrize("value", ["always", True, {"limit": 0}, {"within": 0}, {"max": 1}])
def test_wrong_configuration(value: object) -> None:
    with pytest.raises(ValueError, match="restart"):
        VmFile.model_validate({"name": "a", "restart": value})


def exited(status: int) -> UnitState:
    result = "exit-code" if status else "success"
    return UnitState("failed", "failed", result=result, exit_code=os.CLD_EXITED, exit_status=status)


def killed(number: int, result: str) -> UnitState:
    return UnitState("failed", "failed", result=result, exit_code=os.CLD_KILLED, exit_status=number)


RAN = Record("a", "u", "i", launched=True, ran=True)
NOT_YET = Record("a", "u", "i", launched=True)
CROSVM = Record("a", "u", "i", vmm="crosvm", launched=True)
STOPPING = Record("a", "u", "i", launched=True, ran=True, stopping=True)
CROSVM_STOPPING = Record("a", "u", "i", vmm="crosvm", launched=True, stopping=True)


@pytest.mark.parametrize(
    ("record", "unit", "code"),
    [
        (RAN, exited(0), "powered-off"),
        (STOPPING, exited(0), "stopped"),
        (STOPPING, killed(signal.SIGTERM, "success"), "stopped"),
        (STOPPING, killed(signal.SIGKILL, "timeout"), "timeout"),
        (RAN, UnitState("inactive", "dead"), "stopped"),
        (RAN, exited(1), "panic"),
        (NOT_YET, exited(1), "failed"),
        (RAN, killed(signal.SIGSEGV, "core-dump"), "crash"),
        (RAN, killed(signal.SIGKILL, "signal"), "killed"),
        (RAN, killed(signal.SIGKILL, "oom-kill"), "out-of-memory"),
        (RAN, killed(signal.SIGABRT, "watchdog"), "watchdog"),
        (CROSVM, exited(32), "reset"),
        (CROSVM, exited(33), "crash"),
        (CROSVM, exited(34), "panic"),
        (CROSVM, exited(35), "bad-arguments"),
        (CROSVM, exited(36), "watchdog"),
        (
            CROSVM_STOPPING,
            UnitState("inactive", "dead", exit_code=os.CLD_EXITED, exit_status=32),
            "stopped",
        ),
        (None, exited(226), "start-failed"),
        (Record("a", "u", "i"), killed(signal.SIGTERM, "timeout"), "start-failed"),
    ],
)
def test_explain(record: Record | None, unit: UnitState, code: str) -> None:
    found = explain(Vm("a", record=record), unit, killed=False)
    assert found.kind.value == code
    assert found.text
    assert "\n" not in found.text
    assert len(found.text) < 200


def test_killed_on_request_comes_first() -> None:
    vm = Vm("a", record=RAN)
    outcome = explain(vm, killed(signal.SIGKILL, "oom-kill"), killed=True)
    assert outcome.kind is OutcomeKind.KILLED_ON_REQUEST


def test_a_wished_end_leaves_no_text() -> None:
    for kind in OutcomeKind:
        text = Vm("a", last=outcome(kind)).last_result
        assert bool(text) == (kind.value not in ("stopped", "powered-off"))


def test_the_history_is_kept_in_a_file(tmp_path: Path) -> None:
    last = Outcome(OutcomeKind.CRASH, "fact", "hint")
    history = History((1.0,), (2.0, 3.0), 4.5, last, "i1", "i2")
    save_history("a", history, tmp_path)
    save_history("b", History(due=1.0), tmp_path)
    (tmp_path / "c.history").write_text("{}")
    assert load_histories(tmp_path) == {"a": history, "b": History(due=1.0)}
    save_history("a", EMPTY, tmp_path)
    save_history("never", EMPTY, tmp_path)
    assert set(load_histories(tmp_path)) == {"b"}
    (tmp_path / "file").touch()
    with pytest.raises(Failed):
        save_history("b", history, tmp_path / "file")
