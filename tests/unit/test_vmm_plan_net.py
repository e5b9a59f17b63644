"""Network interfaces in launch plans, against golden files of their part of the argv, one argument per line.
VMSILO_UPDATE_GOLDEN=1 rewrites them: read the diff.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from vmsilod.vmm.choose import VmmKind
from vmsilod.vmm.drivers import DRIVERS
from vmsilod.vmm.errors import BadOptionValue, LaunchRefused
from vmsilod.vmm.launch import (
    FD_BASE,
    BuiltinVsock,
    Console,
    KernelVsock,
    Launch,
    Leases,
    NetDevice,
    QemuShape,
    VmShape,
)

GOLDEN = Path(__file__).parent / "golden" / "vmm-net"

VM = VmShape("banking", memory_mib=1024, cpus=4)
Q35 = replace(VM, qemu=QemuShape(machine="q35"))
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
    root=None,
)
BUILTIN = replace(LEASES, vsock=BuiltinVsock(cid=3, socket_path="/run/vsock"))
ONE = NetDevice("wan", "02:00:00:00:00:01", (40,))
MORE = NetDevice("lan.7", "02:00:00:00:00:02", (41, 42, 43, 44))
VHOST_ONE = replace(ONE, vhost_fds=(50,))
VHOST_MORE = replace(MORE, vhost_fds=(51, 52, 53, 54))

CASES = {
    "crosvm": (VmmKind.CROSVM, VM, (ONE, replace(MORE, tap_fds=(41,)))),
    "qemu-microvm": (VmmKind.QEMU, VM, (ONE, MORE)),
    "qemu-microvm-vhost": (VmmKind.QEMU, VM, (VHOST_ONE, VHOST_MORE)),
    "qemu-q35": (VmmKind.QEMU, Q35, (ONE, MORE)),
    "qemu-q35-vhost": (VmmKind.QEMU, Q35, (VHOST_MORE,)),
    "cloud-hypervisor": (VmmKind.CLOUD_HYPERVISOR, VM, (ONE, MORE)),
}


def plan(kind: VmmKind, vm: VmShape, *nets: NetDevice) -> Launch:
    leases = BUILTIN if kind is VmmKind.CLOUD_HYPERVISOR else LEASES
    driver = DRIVERS[kind]
    return driver.plan_launch(vm, replace(leases, nets=nets), console=Console.NONE, binary="/usr/bin/vmm")


@pytest.mark.parametrize("case", CASES)
def test_argv_is_that_of_an_offline_vm_and_the_golden_part(case: str) -> None:
    kind, vm, nets = CASES[case]
    offline, online = plan(kind, vm), plan(kind, vm, *nets)
    # What is added stands together, before everything that an offline VM has after it.
    start = next(i for i, (a, b) in enumerate(zip(offline.argv, online.argv, strict=False)) if a != b)
    end = len(online.argv) - (len(offline.argv) - start)
    added = online.argv[start:end]
    if added[-1].startswith("-"):
        # It begins with the word that what follows begins with.
        added = (added[-1], *added[:-1])
    wanted = [fd for net in nets for fd in net.fds]
    numbered = [f"# fd {FD_BASE + i} = {fd}" for i, fd in enumerate(online.fds) if fd in wanted]
    text = "\n".join([*numbered, *added]) + "\n"
    golden = GOLDEN / f"{case}.txt"
    if os.environ.get("VMSILO_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    assert sorted(online.fds) == sorted([*offline.fds, *wanted])


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES)


@pytest.mark.parametrize("vm", [VM, Q35])
@pytest.mark.parametrize("kind", VmmKind)
def test_an_offline_vm_has_nothing_of_a_network(kind: VmmKind, vm: VmShape) -> None:
    line = " ".join(plan(kind, vm).argv)
    assert not [word for word in ("--net", "-netdev", "virtio-net", "pcie-root-port") if word in line]


@pytest.mark.parametrize("kind", VmmKind)
@pytest.mark.parametrize(
    "net",
    [
        replace(ONE, mac="02:00:00:00:00"),
        replace(ONE, mac="01:00:00:00:00:01"),
        replace(ONE, mac="02:00:00:00:00:01,host-ip=10.0.0.1"),
        replace(ONE, name="a,tap=b"),
        replace(ONE, name="x" * 16),
        replace(ONE, name=""),
    ],
)
def test_what_could_be_another_option_is_refused(kind: VmmKind, net: NetDevice) -> None:
    with pytest.raises(BadOptionValue):
        plan(kind, VM, net)


@pytest.mark.parametrize(
    ("kind", "net"),
    [
        (VmmKind.CROSVM, MORE),
        (VmmKind.CROSVM, VHOST_ONE),
        (VmmKind.CLOUD_HYPERVISOR, VHOST_ONE),
        (VmmKind.QEMU, replace(VHOST_MORE, vhost_fds=(51,))),
        (VmmKind.QEMU, replace(ONE, tap_fds=())),
        (VmmKind.QEMU, replace(ONE, tap_fds=(-1,))),
    ],
)
def test_queues_that_a_vmm_cannot_use_are_refused(kind: VmmKind, net: NetDevice) -> None:
    with pytest.raises(LaunchRefused):
        plan(kind, VM, net)
