"""A running VM's memory: limits from its configuration, sizes from a real API server."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest
from cloud_hypervisor_server import INFO, MIB, cloud_hypervisor_that_answers
from gi.repository import GLib
from vmsilod import loop
from vmsilod.config.model import VmConfig
from vmsilod.errors import BadRequest, NotRunning, VmsiloError
from vmsilod.memory import read_memory, resize_memory
from vmsilod.registry import Vm
from vmsilod.resources import rundir
from vmsilod.resources.record import Record
from vmsilod.systemd import INACTIVE

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path
    from typing import Any


def run(coro: Coroutine[Any, Any, dict[str, int]]) -> dict[str, int]:
    main_loop = GLib.MainLoop()
    future = loop.spawn(coro)
    future.add_done_callback(lambda _: loop.call_soon(main_loop.quit))
    main_loop.run()
    return future.result()


def make_vm(memory_max: int | None, *, up: bool = True) -> Vm:
    config = VmConfig.model_validate(
        {
            "name": "banking",
            "user": "david",
            "memory": 1024,
            "memory_max": memory_max,
            "cpus": 1,
            "color": "red",
            "image": "default",
            "start_timeout": 9,
            "stop_timeout": 9,
        }
    )
    vm = Vm("banking", config=config)
    if up:
        vm.unit = dataclasses.replace(INACTIVE, active="active")
        vm.record = Record("banking", vm.service, "a", vmm="cloud-hypervisor", config=config.to_json())
    return vm


@pytest.fixture
def socket_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rundir, "VM_DIR", tmp_path)
    (tmp_path / "banking").mkdir()
    return tmp_path / "banking" / "monitor.sock"


def test_vm_that_does_not_run_has_limits() -> None:
    assert run(read_memory(make_vm(2048, up=False))) == {"configured": 1024, "maximum": 2048}


def test_memory_without_a_maximum_is_what_is_configured() -> None:
    fixed = {"configured": 1024, "maximum": 1024, "requested": 1024, "actual": 1024}
    assert run(read_memory(make_vm(None))) == fixed


def test_running_vm_is_asked_and_its_vmm_says_what_came_of_it(socket_path: Path) -> None:
    answers = {"vm.info": (200, json.dumps(INFO).encode()), "vm.resize": (204, b"")}
    with cloud_hypervisor_that_answers(socket_path, answers) as server:
        memory = run(resize_memory(make_vm(2048), 1536))
    assert server.requests[0] == ("PUT", "vm.resize", {"desired_ram": 1536 * MIB})
    assert memory == {"configured": 1024, "maximum": 2048, "requested": 1536, "actual": 1280}


@pytest.mark.parametrize(
    ("vm", "size", "kind"),
    [
        (make_vm(2048), 1023, BadRequest),
        (make_vm(2048), 2050, BadRequest),
        (make_vm(2048), 1025, BadRequest),
        (make_vm(None), 1024, BadRequest),
        (make_vm(2048, up=False), 1536, NotRunning),
        (make_vm(2048), 1536, VmsiloError),  # nobody listens
    ],
)
def test_what_cannot_be_is_refused(socket_path: Path, vm: Vm, size: int, kind: type[VmsiloError]) -> None:
    assert not socket_path.exists()
    with pytest.raises(kind):
        run(resize_memory(vm, size))
