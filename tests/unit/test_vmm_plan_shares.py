"""Shared directories in the argv of each VMM: as the VMMs' own help has it, by descriptor."""

from __future__ import annotations

from dataclasses import replace

from vmsilod.vmm import cloud_hypervisor, crosvm, qemu
from vmsilod.vmm.launch import (
    FD_BASE,
    BuiltinVsock,
    Console,
    KernelVsock,
    Launch,
    Leases,
    QemuShape,
    ShareDevice,
    VmShape,
)

VM = VmShape("banking", memory_mib=1024, cpus=2)
SHARED = Leases(
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
    shares=(ShareDevice("vmsilo-home", 40), ShareDevice("books", 41)),
)


def values(launch: Launch, option: str, word: str) -> list[str]:
    """The values of an option that begin with a word; descriptor numbers as those that were passed."""
    found = [
        value
        for name, value in zip(launch.argv, launch.argv[1:], strict=False)
        if name == option and value.startswith(word)
    ]
    for number, fd in enumerate(launch.fds, FD_BASE):
        found = [f"{value},".replace(f"fd={number},", f"fd={fd},")[:-1] for value in found]
        found = [f"{value},".replace(f"/fd/{number},", f"/fd/{fd},")[:-1] for value in found]
    return found


def test_crosvm_asks_virtiofsd_for_the_tag() -> None:
    launch = crosvm.plan_launch(VM, SHARED, console=Console.NONE, binary="/c")
    assert values(launch, "--vhost-user", "fs") == [
        "fs,socket=/proc/self/fd/40,max-queue-size=1024",
        "fs,socket=/proc/self/fd/41,max-queue-size=1024",
    ]


def test_a_microvm_needs_no_pci_for_them() -> None:
    launch = qemu.plan_launch(VM, SHARED, console=Console.NONE, binary="/q")
    assert values(launch, "-machine", "microvm")
    assert values(launch, "-chardev", "socket,id=share") == [
        "socket,id=share0,fd=40",
        "socket,id=share1,fd=41",
    ]
    assert values(launch, "-device", "vhost-user-fs") == [
        "vhost-user-fs-device,chardev=share0,tag=vmsilo-home,queue-size=1024",
        "vhost-user-fs-device,chardev=share1,tag=books,queue-size=1024",
    ]
    q35 = replace(VM, qemu=QemuShape(machine="q35"))
    launch = qemu.plan_launch(q35, SHARED, console=Console.NONE, binary="/q")
    assert len(values(launch, "-device", "vhost-user-fs-pci,")) == 2


def test_cloud_hypervisor_connects_by_itself() -> None:
    leases = replace(SHARED, vsock=BuiltinVsock(3, "/run/v"))
    launch = cloud_hypervisor.plan_launch(VM, leases, console=Console.NONE, binary="/h")
    assert values(launch, "--fs", "tag=") == [
        "tag=vmsilo-home,socket=/proc/self/fd/40,num_queues=1,queue_size=1024",
        "tag=books,socket=/proc/self/fd/41,num_queues=1,queue_size=1024",
    ]
