"""Which VM has which disk: no disk is written by one running VM while another has it.

Called by the runs when a start has opened its disks, on the loop, so that of two starts at once one is
first. What a VM has is in its record, and ends with it. A lock against other programs follows, and the look
at what the disks begin with, which nobody can change any more then.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from vmsilod import loop
from vmsilod.errors import StartFailed
from vmsilod.resources import disk_keys, disks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmsilod.preparation import Acquired
    from vmsilod.registry import Registry, Vm


@dataclass(frozen=True)
class Claim:
    """`keys`: its own first, then those of the disks that it has bytes in common with; `backing`: the one
    that it has all of, as a loop device has its file.
    """

    keys: tuple[str, ...]
    writes: bool
    title: str
    backing: str = ""


async def hold_disks(
    registry: Registry, vm: Vm, acquired: Acquired, *, root_writable: bool, root_pmem: bool
) -> None:
    """StartFailed names the VM that has one of the disks, or says what is wrong with one."""
    assert vm.record is not None
    claims = await loop.in_patient_worker(_make_claims, acquired, root_writable)
    refuse_twice(vm.name, claims)
    refuse_conflicts(vm.name, claims, find_holders(registry))
    held = {claim.keys[0]: claim.writes for claim in claims}
    backings = {claim.backing: claim.writes for claim in claims if claim.backing}
    vm.record = replace(vm.record, disks=held, backings=backings, root_pmem=root_pmem)
    if root_writable:
        await loop.in_patient_worker(
            partial(disks.lock_file, acquired.root_fd, "the root disk", writable=True)
        )
    await loop.in_patient_worker(disks.lock_disks, acquired.disks)
    await loop.in_patient_worker(disks.check_formats, acquired.disks, acquired.root_fd)
    await loop.in_patient_worker(disks.set_direct, acquired.disks)


def _make_claims(acquired: Acquired, root_writable: bool) -> list[Claim]:  # noqa: FBT001 - for a worker
    opened = [(acquired.root_fd, root_writable, "the root disk")]
    opened += [(disk.fd, not disk.readonly, disk.title) for disk in acquired.disks]
    return [
        Claim(
            (disk_keys.key_of(fd), *sorted(disk_keys.relatives_of(fd))),
            writes,
            title,
            disk_keys.backing_of(fd),
        )
        for fd, writes, title in opened
    ]


def find_holders(registry: Registry) -> dict[str, Mapping[str, bool]]:
    """VM -> key of a disk -> whether it writes."""
    return {vm.name: vm.record.disks | vm.record.backings for vm in registry if vm.record is not None}


def refuse_twice(name: str, claims: Sequence[Claim]) -> None:
    """Pure. One disk of a VM may not be another one of its own, or a part of that."""
    for claim, other in itertools.permutations(claims, 2):
        if claim.keys[0] in other.keys or claim.backing in other.keys:
            raise StartFailed(
                f"VM '{name}' has one disk twice: {claim.title}, {other.title}",
                "additional_disks and root_disk: each once",
            )


def refuse_conflicts(name: str, claims: Sequence[Claim], holders: Mapping[str, Mapping[str, bool]]) -> None:
    """Pure."""
    for other, held in holders.items():
        if other == name:
            continue
        for claim in claims:
            for key in claim.keys:
                if key in held and (claim.writes or held[key]):
                    verb = "is writing" if held[key] else "is reading"
                    raise StartFailed(
                        f"{claim.title}: VM '{other}', which runs, {verb} this disk",
                        f"vm-stop {other}; or let both have it read-only",
                    )


def find_holder(key: str, holders: Mapping[str, Mapping[str, bool]]) -> str:
    """A VM that has it, "" for none."""
    return next((name for name, held in holders.items() if key in held), "")
