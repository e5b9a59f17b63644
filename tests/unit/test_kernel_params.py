"""The guest's kernel command line."""

from __future__ import annotations

from vmsilod.vmm.kernel_params import plan_kernel_params
from vmsilod.vmm.launch import Console, KernelVsock, Leases, VmShape

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
    empty_dir="/usr/lib/vmsilo/empty",
    root=None,
)


def test_interfaces_are_named_before_what_the_user_adds() -> None:
    names = (("wan", "52:54:00:12:34:56"), ("peers", "0e:00:00:00:00:01"))
    vm = VmShape("banking", memory_mib=1024, cpus=2, kernel_params=("mitigations=auto",), ifnames=names)
    words = plan_kernel_params(vm, LEASES, console=Console.NONE).split()
    assert words[-3:] == [
        "vmsilo.ifname=wan,52:54:00:12:34:56",
        "vmsilo.ifname=peers,0e:00:00:00:00:01",
        "mitigations=auto",
    ]
