"""Which VM has which disk: no disk is written by one running VM while another has it.

Called by the runs when a start has opened its disks, on the loop, so that of two starts at once one is
first. What a VM has is in its record, and ends with it. A lock against other programs follows, and the look
at what the disks begin with, which nobody can change any more then.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING

from vmsilod import loop
from vmsilod.errors import StartFailed
from vmsilod.resources import disks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmsilod.preparation import Acquired
    from vmsilod.registry import Registry, Vm


async def hold_disks(registry: Registry, vm: Vm, acquired: Acquired, *, root_writable: bool) -> None:
    """StartFailed names the VM that has one of the disks, or says what is wrong with one."""
    assert vm.record is not None
    wanted = {disks.key_of(acquired.root_fd): (root_writable, "the root disk")}
    for disk in acquired.disks:
        wanted[disks.key_of(disk.fd)] = (not disk.readonly, disk.title)
    if len(wanted) <= len(acquired.disks):
        raise StartFailed(f"VM '{vm.name}' has one disk twice", "additional_disks and root_disk: each once")
    refuse_conflicts(vm.name, wanted, find_holders(registry))
    vm.record = dataclasses.replace(vm.record, disks={key: writes for key, (writes, _) in wanted.items()})
    if root_writable:
        await loop.in_patient_worker(
            partial(disks.lock_file, acquired.root_fd, "the root disk", writable=True)
        )
    await loop.in_patient_worker(disks.lock_disks, acquired.disks)
    await loop.in_patient_worker(disks.check_formats, acquired.disks, acquired.root_fd)
    await loop.in_patient_worker(disks.set_direct, acquired.disks)


def find_holders(registry: Registry) -> dict[str, Mapping[str, bool]]:
    """VM -> key of a disk -> whether it writes."""
    return {vm.name: vm.record.disks for vm in registry if vm.record is not None}


def refuse_conflicts(
    name: str, wanted: Mapping[str, tuple[bool, str]], holders: Mapping[str, Mapping[str, bool]]
) -> None:
    """Pure. `wanted`: key -> (whether this VM writes, what the disk is called)."""
    for other, held in holders.items():
        if other == name:
            continue
        for key, (writes, title) in wanted.items():
            if key in held and (writes or held[key]):
                verb = "is writing" if held[key] else "is reading"
                raise StartFailed(
                    f"{title}: VM '{other}', which runs, {verb} this disk",
                    f"vm-stop {other}; or let both have it read-only",
                )


def find_holder(key: str, holders: Mapping[str, Mapping[str, bool]]) -> str:
    """A VM that has it, "" for none."""
    return next((name for name, held in holders.items() if key in held), "")
