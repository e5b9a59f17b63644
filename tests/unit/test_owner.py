"""Who may run commands in a VM that was started before its owner changed."""

from __future__ import annotations

import pytest
from vmsilod.config.model import VmConfig
from vmsilod.errors import Denied
from vmsilod.lifecycle import refuse_new_owner
from vmsilod.registry import Vm
from vmsilod.resources.record import Record


def configured(user: str) -> VmConfig:
    return VmConfig(
        name="banking", user=user, memory=512, cpus=1, color="red", image="default",
        start_timeout=180, stop_timeout=30,
    )  # fmt: skip


def running(started_for: str, now: VmConfig | None) -> Vm:
    record = Record(
        name="banking", unit="vmsilo-banking-vm.service", invocation="1", vmm="qemu", uid=61200, cid=3,
        config=configured(started_for).to_json(),
    )  # fmt: skip
    return Vm("banking", config=now, record=record)


def test_a_new_owner_waits_until_the_vm_has_stopped() -> None:
    vm = running("daemon", configured("nobody"))
    refuse_new_owner(vm, 1)  # daemon's uid on Debian (base-passwd): it was started for it
    refuse_new_owner(vm, 0)
    with pytest.raises(Denied, match="still runs for the user 'daemon'"):
        refuse_new_owner(vm, 65534)


def test_so_does_everybody_else_when_the_file_is_gone() -> None:
    with pytest.raises(Denied):
        refuse_new_owner(running("daemon", None), 65534)


def test_without_a_change_polkit_alone_decides() -> None:
    refuse_new_owner(running("daemon", configured("daemon")), 65534)
    refuse_new_owner(Vm("banking", config=configured("nobody")), 65534)


def test_root_is_not_kept_out_by_an_account_that_is_gone() -> None:
    refuse_new_owner(running("no-such-user", configured("nobody")), 0)
