"""A systemd that does not answer at the wrong moment: what a run held is given back nevertheless.

Runs, endings and systemd are stand-ins.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from main_loop import run
from vmsilod import loop
from vmsilod.config.model import VmConfig
from vmsilod.errors import Failed
from vmsilod.lifecycle import Lifecycle
from vmsilod.registry import Registry
from vmsilod.resources.record import Record
from vmsilod.systemd import INACTIVE, UnitState

if TYPE_CHECKING:
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


@pytest.fixture
def systemd() -> Systemd:
    return Systemd()


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def lifecycle(systemd: Systemd, registry: Registry) -> Lifecycle:
    """With the VM box, which runs."""
    holders = SimpleNamespace(usb=None, endings=Endings(), pci=None, network=None)
    publication = SimpleNamespace(show_status=lambda _vm: None)
    made = Lifecycle(registry, *cast("tuple[Any, ...]", (systemd, holders, Runs(), publication)))
    vm = registry.adopt("box")
    vm.unit, vm.config = systemd.unit, CONFIG
    vm.record = Record("box", vm.service, "a", vmm="qemu", config="")
    return made


def test_a_run_that_ended_unseen_is_settled_by_the_next_attempt(
    lifecycle: Lifecycle, registry: Registry, systemd: Systemd
) -> None:
    with pytest.raises(Failed, match="does not answer"):
        run(lifecycle.discard("box"))
    assert registry.require("box").record is not None
    systemd.answers = True
    run(lifecycle.discard("box"))
    assert registry.require("box").record is None


def test_an_end_that_systemd_says_once_is_asked_about_until_it_answers(
    lifecycle: Lifecycle, registry: Registry, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmsilod.lifecycle.REFRESH_AGAIN", (0.05, 0.05, 5.0))
    systemd.unit, systemd.answers = INACTIVE, False

    async def go() -> None:
        lifecycle.unit_changed(registry.require("box").service)
        await loop.after(0.07)
        assert registry.require("box").record is not None
        systemd.answers = True
        await loop.after(0.2)

    run(go())
    assert registry.require("box").record is None


def test_what_somebody_waited_for_in_vain_is_caught_up_with(
    lifecycle: Lifecycle, registry: Registry, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal that told of the end came while the refresh was under way, and there is no other."""
    monkeypatch.setattr("vmsilod.lifecycle.REFRESH_AGAIN", (0.05, 5.0))

    async def go() -> None:
        with pytest.raises(Failed, match="does not answer"):
            await lifecycle.discard("box")
        systemd.answers = True
        await loop.after(0.2)

    run(go())
    assert registry.require("box").record is None
