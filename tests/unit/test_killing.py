"""An end at once is one of a run: what is started meanwhile is another, and is told as another."""

from __future__ import annotations

import dataclasses
import signal
from typing import TYPE_CHECKING, Any, cast

import pytest
from main_loop import run
from vmsilod.errors import Failed
from vmsilod.killing import end_run
from vmsilod.registry import Vm
from vmsilod.systemd import INACTIVE, UnitState

if TYPE_CHECKING:
    from collections.abc import Callable

FIRST = dataclasses.replace(INACTIVE, active="active", invocation="first")
SECOND = dataclasses.replace(INACTIVE, active="activating", invocation="second")


class Systemd:
    """`stops`: what a stop changes, and its result."""

    def __init__(self, stops: Callable[[Systemd], str]) -> None:
        self.unit = FIRST
        self.kills: list[tuple[str, int]] = []
        self._stops = stops

    async def state(self, _unit: str) -> UnitState:
        return self.unit

    async def stop(self, _unit: str) -> str:
        return self._stops(self)

    async def kill(self, _unit: str, number: int) -> None:
        self.kills.append((self.unit.invocation, number))


class Endings:
    def __init__(self, *, room: bool = True) -> None:
        self._room = room

    async def mark_stopping(self, _vm: Vm) -> None:
        if not self._room:
            raise Failed("cannot write: No space left on device")


def end(systemd: Systemd, vm: Vm, endings: Endings | None = None) -> None:
    run(end_run(*cast("tuple[Any, Any]", (systemd, endings or Endings())), vm, 0.2))


def go_in_time(systemd: Systemd) -> str:
    systemd.unit = INACTIVE
    return "done"


def test_what_goes_in_time_is_not_killed() -> None:
    systemd, vm = Systemd(go_in_time), Vm("box")
    end(systemd, vm)
    assert systemd.kills == []
    assert vm.killing == "first"


def test_a_run_whose_stop_was_replaced_by_a_start_is_killed() -> None:
    systemd = Systemd(lambda _: "canceled")
    end(systemd, Vm("box"))
    assert systemd.kills == [("first", signal.SIGKILL)]


def test_the_run_that_was_started_meanwhile_lives() -> None:
    def replace(systemd: Systemd) -> str:
        systemd.unit = SECOND
        return "canceled"

    systemd, vm = Systemd(replace), Vm("box")
    end(systemd, vm)
    assert systemd.kills == []
    assert vm.killing != SECOND.invocation


def test_an_end_that_did_not_begin_leaves_the_run_as_it_was() -> None:
    """Else its next stop would be a kill that nobody asked for."""
    systemd, vm = Systemd(go_in_time), Vm("box")
    with pytest.raises(Failed, match="No space"):
        end(systemd, vm, Endings(room=False))
    assert vm.killing == ""
    assert systemd.unit is FIRST
