"""The table of VMM drivers: for each kind the functions that plan, control and explain it.

The one place that names them all; the lifecycle looks a driver up here and knows no VMM by name.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vmsilod.vmm import cloud_hypervisor, crosvm, qemu
from vmsilod.vmm.choose import VmmKind
from vmsilod.vmm.cloud_hypervisor_api import CloudHypervisorMonitor
from vmsilod.vmm.crosvm_control import CrosvmMonitor
from vmsilod.vmm.monitor import DEFAULT_TIMEOUT
from vmsilod.vmm.qmp import QemuMonitor

if TYPE_CHECKING:
    from pathlib import Path

    from vmsilod.vmm.launch import Console, Launch, Leases, VmShape
    from vmsilod.vmm.monitor import MonitorClient
    from vmsilod.vmm.outcome import Outcome


class PlanLaunch(Protocol):
    def __call__(self, vm: VmShape, leases: Leases, *, console: Console, binary: str) -> Launch: ...


class ExplainExit(Protocol):
    def __call__(self, code: int | None, number: int | None, *, guest_ran: bool = False) -> Outcome: ...


class OpenMonitor(Protocol):
    def __call__(self, path: Path, *, timeout: float = DEFAULT_TIMEOUT) -> MonitorClient: ...


@dataclass(frozen=True)
class Driver:
    plan_launch: PlanLaunch
    explain_exit: ExplainExit
    open_monitor: OpenMonitor
    monitor_type: socket.SocketKind
    """What the listening monitor descriptor must be."""
    builtin_vsock: bool = False
    """The VMM brings its own hybrid vsock, and takes no other."""
    pmem_root: bool = False
    """A read-only root is persistent memory where nobody asked for something else."""
    pmem: bool = False
    """It can be, if it is an ordinary file."""
    pmem_huge: bool = False
    """It can be, if it is in huge pages; then it is."""
    opens_by_path: bool = False
    """The VMM opens what it is passed once more, by /proc/self/fd and with its own rights: disks and the
    sockets of vhost-user devices too."""
    looks_up_tap: bool = False
    """It asks for the MTU of a TAP by its name, in its own network namespace."""
    speaks_when_running: bool = False
    """Whether explain_exit needs guest_ran, and first_sign.py can find it out."""


DRIVERS = {
    VmmKind.CROSVM: Driver(
        crosvm.plan_launch,
        crosvm.explain_exit,
        CrosvmMonitor,
        socket.SOCK_SEQPACKET,
        # Not in huge pages: it maps a file where it has reserved room in steps of 4 KiB, which the kernel
        # refuses for hugetlbfs.
        pmem=True,
        looks_up_tap=True,
    ),
    VmmKind.QEMU: Driver(
        qemu.plan_launch,
        qemu.explain_exit,
        QemuMonitor,
        socket.SOCK_STREAM,
        pmem=True,
        pmem_huge=True,
        speaks_when_running=True,
    ),
    VmmKind.CLOUD_HYPERVISOR: Driver(
        cloud_hypervisor.plan_launch,
        cloud_hypervisor.explain_exit,
        CloudHypervisorMonitor,
        socket.SOCK_STREAM,
        builtin_vsock=True,
        pmem_root=True,
        pmem=True,
        pmem_huge=True,
        opens_by_path=True,
    ),
}
