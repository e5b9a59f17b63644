"""Launch plans of VMs whose root is persistent memory, against golden argv files (see test_vmm_plan.py), and
when it is that.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from unit.test_vmm_plan import GROWING, LEASES, MICROVM, VM
from vmsilod.config.image_options import ImageOptions
from vmsilod.config.model import VmConfig
from vmsilod.config.schema import QemuOptions
from vmsilod.errors import StartFailed
from vmsilod.preparation import Acquired
from vmsilod.resources.image import BootFiles
from vmsilod.shapes import is_root_pmem
from vmsilod.vmm import crosvm, qemu
from vmsilod.vmm.choose import VmmKind
from vmsilod.vmm.errors import LaunchRefused
from vmsilod.vmm.launch import Console, Disk, Launch, PciFunction

GOLDEN = Path(__file__).parent / "golden" / "vmm-pmem"
PMEM = replace(LEASES, root=Disk(fd=24, readonly=True, pmem=True, size=58 << 21))
PLANS = {
    "crosvm-pmem": crosvm.plan_launch(VM, PMEM, console=Console.NONE, binary="/usr/bin/crosvm"),
    "qemu-pmem": qemu.plan_launch(VM, PMEM, console=Console.NONE, binary="/usr/bin/qemu-system-x86_64"),
    "qemu-pmem-memory-max": qemu.plan_launch(
        GROWING, PMEM, console=Console.NONE, binary="/usr/bin/qemu-system-x86_64"
    ),
}


def options_of(plan: Launch) -> dict[str, str]:
    return dict(zip(plan.argv, plan.argv[1:], strict=False))


@pytest.mark.parametrize("name", PLANS)
def test_plan_is_the_golden_one(name: str) -> None:
    file = GOLDEN / f"{name}.txt"
    text = "\n".join(PLANS[name].argv) + "\n"
    if os.environ.get("VMSILO_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()
    assert 24 in PLANS[name].fds


def test_qemu_has_room_for_it_beside_memory_that_can_grow() -> None:
    assert options_of(PLANS["qemu-pmem"])["-m"] == f"1024M,maxmem={1024 + 116 + 1024}M"
    assert options_of(PLANS["qemu-pmem-memory-max"])["-m"] == f"1024M,maxmem={4096 + 116 + 1024}M"


def test_a_device_of_the_host_keeps_its_bounce_buffers() -> None:
    vm = replace(VM, needs_pci=True, pci=(PciFunction("0000:01:00.0"),))
    plan = qemu.plan_launch(vm, PMEM, console=Console.NONE, binary="qemu")
    assert "swiotlb" not in options_of(plan)["-append"]


def test_microvm_has_no_place_for_it() -> None:
    with pytest.raises(LaunchRefused):
        qemu.plan_launch(MICROVM, PMEM, console=Console.NONE, binary="qemu")


def ask(
    kind: VmmKind, *, device: str = "auto", huge: bool = False, able: bool = True, machine: str = "auto"
) -> bool:
    config = VmConfig(
        name="a",
        user="user",
        memory=512,
        cpus=1,
        color="red",
        image="default",
        image_options=ImageOptions.model_validate({"device": device, "hugepages": huge}),
        qemu=QemuOptions.model_validate({"machine": machine}),
        start_timeout=1,
        stop_timeout=1,
    )
    files = BootFiles(Path("/k"), None, Path("/r"), "v1", pmem=able)
    acquired = Acquired("s", 3, Path("/d"), files, 4, None, 5, 6, None, None, root_pmem=able, root_huge=huge)
    return is_root_pmem(config, acquired, kind)


@pytest.mark.parametrize(
    ("kind", "huge", "expected"),
    [
        (VmmKind.QEMU, False, False),
        (VmmKind.QEMU, True, True),
        (VmmKind.CROSVM, False, False),
        (VmmKind.CROSVM, True, False),
        (VmmKind.CLOUD_HYPERVISOR, False, True),
        (VmmKind.CLOUD_HYPERVISOR, True, True),
    ],
)
def test_where_a_root_is_persistent_memory_by_itself(kind: VmmKind, huge: bool, expected: bool) -> None:  # noqa: FBT001
    assert ask(kind, huge=huge) is expected
    assert not ask(kind, huge=huge, device="disk")
    assert not ask(kind, huge=huge, able=False)


def test_microvm_by_name_keeps_its_disk() -> None:
    assert not ask(VmmKind.QEMU, huge=True, machine="microvm")


def test_what_was_asked_for_and_cannot_be_is_refused() -> None:
    assert ask(VmmKind.CROSVM, device="pmem")
    assert ask(VmmKind.QEMU, device="pmem")
    refused: list[dict[str, Any]] = [
        {"kind": VmmKind.CROSVM, "huge": True},
        {"kind": VmmKind.QEMU, "machine": "microvm"},
        {"kind": VmmKind.QEMU, "able": False},
    ]
    for question in refused:
        with pytest.raises(StartFailed, match="cannot be persistent memory"):
            ask(device="pmem", **question)
