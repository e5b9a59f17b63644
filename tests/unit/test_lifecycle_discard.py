"""A disposable's VM is taken away: after a failure half-way, the next attempt gives back what its run held.

Runs, endings and systemd are stand-ins: of interest is a systemd that stops a unit and then does not answer.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from gi.repository import GLib
from vmsilod import loop
from vmsilod.config.model import VmConfig
from vmsilod.errors import Failed
from vmsilod.lifecycle import Lifecycle
from vmsilod.registry import Registry
from vmsilod.resources.record import Record
from vmsilod.systemd import INACTIVE, UnitState

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from vmsilod.registry import Vm


CONFIG = VmConfig.model_validate(
    {
        **{"name": "box", "user": "root", "memory": 512, "cpus": 1, "color": "red", "image": "default"},
        **{"start_timeout": 9, "stop_timeout": 9, "template": "work"},
    }
)


class Systemd:
    def __init__(self) -> None:
        self.unit = dataclasses.replace(INACTIVE, active="active")
        self.answers = True

    async def state(self, _unit: str) -> UnitState:
        if not self.answers:
            raise Failed("systemd does not answer")
        return self.unit

    async def stop(self, _unit: str) -> str:
        self.unit, self.answers = INACTIVE, False
        return "done"


class Endings:
    async def cancel(self, _vm: Vm) -> None:
        pass

    mark_stopping = tell = cancel


class Runs:
    relay = None

    async def release(self, vm: Vm) -> None:
        vm.forget_run()


def run(coro: Coroutine[Any, Any, None]) -> None:
    main_loop = GLib.MainLoop()
    future = loop.spawn(coro)
    future.add_done_callback(lambda _: loop.call_soon(main_loop.quit))
    main_loop.run()
    future.result()


def test_a_run_that_ended_unseen_is_settled_by_the_next_attempt() -> None:
    registry, systemd = Registry(), Systemd()
    holders = SimpleNamespace(usb=None, endings=Endings(), pci=None, network=None)
    publication = SimpleNamespace(show_status=lambda _vm: None)
    lifecycle = Lifecycle(registry, *cast("tuple[Any, ...]", (systemd, holders, Runs(), publication)))
    vm = registry.adopt("box")
    vm.unit, vm.config = systemd.unit, CONFIG
    vm.record = Record("box", vm.service, "a", vmm="qemu", config="")
    with pytest.raises(Failed, match="does not answer"):
        run(lifecycle.discard("box"))
    assert vm.record is not None
    systemd.answers = True
    run(lifecycle.discard("box"))
    assert registry.require("box").record is None
