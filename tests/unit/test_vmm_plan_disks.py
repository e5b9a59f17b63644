"""Disks beside the root in the argv of each VMM, against golden files. VMSILO_UPDATE_GOLDEN=1 rewrites them:
read the diff.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from vmsilod.vmm import cloud_hypervisor, crosvm, qemu
from vmsilod.vmm.errors import BadOptionValue, LaunchRefused
from vmsilod.vmm.launch import (
    FD_BASE,
    BuiltinVsock,
    Console,
    Disk,
    DiskDevice,
    KernelVsock,
    Leases,
    QemuShape,
    VmShape,
)

if TYPE_CHECKING:
    from vmsilod.vmm.drivers import PlanLaunch

GOLDEN = Path(__file__).parent / "golden" / "vmm-disks"
VM = VmShape("banking", memory_mib=1024, cpus=2)
DISKS = (
    DiskDevice(40, "vmsilo-overlay", lock=False),
    DiskDevice(41, "data", sparse=False, direct=True, block_size=4096),
    DiskDevice(42, "old.qcow2_1", readonly=True, format="qcow2"),
)
LEASES = Leases(
    name="banking",
    uid=60001,
    gid=60001,
    owner=1000,
    vsock=KernelVsock(cid=42, device_fd=21),
    monitor_fd=20,
    kernel_fd=22,
    initrd_fd=23,
    kvm=True,
    empty_dir="/usr/local/lib/vmsilo/empty",
    root=Disk(fd=24, readonly=True),
    disks=DISKS,
)
BUILTIN = replace(
    LEASES,
    vsock=BuiltinVsock(cid=3, socket_path="/run/vmsilo/vm/banking/vsock/vsock"),
    root=Disk(fd=24, readonly=True, pmem=True),
    disks=(DISKS[0], replace(DISKS[1], block_size=512), DISKS[2]),
)
CASES: dict[str, tuple[PlanLaunch, VmShape, Leases]] = {
    "crosvm": (crosvm.plan_launch, VM, LEASES),
    "qemu-q35": (qemu.plan_launch, replace(VM, qemu=QemuShape(machine="q35")), LEASES),
    "qemu-microvm": (qemu.plan_launch, replace(VM, qemu=QemuShape(machine="microvm")), LEASES),
    "cloud-hypervisor": (cloud_hypervisor.plan_launch, VM, BUILTIN),
}


@pytest.mark.parametrize("case", CASES)
def test_disks_are_planned_as_in_the_golden_file(case: str) -> None:
    plan_launch, vm, leases = CASES[case]
    launch = plan_launch(vm, leases, console=Console.NONE, binary="vmm")
    without = plan_launch(vm, replace(leases, disks=()), console=Console.NONE, binary="vmm")
    fds = [f"# fd {FD_BASE + i} = {fd}" for i, fd in enumerate(launch.fds)]
    # Numbers move, so options of others may differ in them; what is there for disks alone, is new.
    options = [argument for argument in launch.argv if argument not in without.argv]
    assert {40, 41, 42} == set(launch.fds) - set(without.fds)
    text = "\n".join([*fds, *options]) + "\n"
    golden = GOLDEN / f"{case}.txt"
    if os.environ.get("VMSILO_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES)


def test_the_guest_is_told_of_an_overlay_on_a_disk() -> None:
    for plan_launch, vm, leases in CASES.values():
        argv = plan_launch(vm, leases, console=Console.NONE, binary="vmm").argv
        assert any(" vmsilo.overlay=disk" in argument for argument in argv)
        argv = plan_launch(vm, replace(leases, disks=()), console=Console.NONE, binary="vmm").argv
        assert not any("vmsilo.overlay" in argument for argument in argv)


def test_block_size_is_refused_where_the_vmm_cannot_have_it() -> None:
    with pytest.raises(LaunchRefused, match="block_size"):
        cloud_hypervisor.plan_launch(
            VM, replace(BUILTIN, disks=(DISKS[1],)), console=Console.NONE, binary="vmm"
        )


@pytest.mark.parametrize("serial", ["", "a,b", "x" * 21, "a b", "-a", "\u00fc"])
@pytest.mark.parametrize("case", CASES)
def test_serial_that_would_end_an_option_is_refused(serial: str, case: str) -> None:
    plan_launch, vm, leases = CASES[case]
    with pytest.raises(BadOptionValue):
        plan_launch(vm, replace(leases, disks=(DiskDevice(40, serial),)), console=Console.NONE, binary="vmm")
