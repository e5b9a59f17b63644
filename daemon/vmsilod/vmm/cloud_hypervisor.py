"""The cloud-hypervisor driver: its argv, and what its exit codes mean.

plan_launch and explain_exit are pure and called by the lifecycle; cloud_hypervisor_api.py talks to one that
runs. Written for version 53. Never starts it without its seccomp filters.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from vmsilod.vmm.disks import plan_cloud_hypervisor as plan_disks
from vmsilod.vmm.errors import BadOptionValue, LaunchRefused
from vmsilod.vmm.escape import quote_cloud_hypervisor
from vmsilod.vmm.kernel_params import plan_kernel_params
from vmsilod.vmm.launch import ENVIRONMENT, BuiltinVsock, Console, Launch, PassedFds
from vmsilod.vmm.net import plan_cloud_hypervisor as plan_net
from vmsilod.vmm.outcome import Outcome, OutcomeKind, explain_signal
from vmsilod.vmm.shares import plan_cloud_hypervisor as plan_shares
from vmsilod.vmm.vhost_user import plan_cloud_hypervisor as plan_vhost_user

if TYPE_CHECKING:
    from vmsilod.vmm.launch import Disk, Leases, VmShape

_LOG_LEVELS = {"warn": (), "info": ("-v",), "debug": ("-vv",), "trace": ("-vvv",)}
_REFUSED_EXTRA = {
    "--seccomp": "vmsilo never runs cloud-hypervisor without its seccomp filters",
    "--api-socket": "vmsilo's own is the one that it takes",
}
_EXITS = {
    0: (OutcomeKind.STOPPED, "the guest powered off, or the VM was stopped"),
    2: (
        OutcomeKind.BAD_ARGUMENTS,
        "cloud-hypervisor does not know one of its arguments: it is older than version 53, or extra_args has"
        " a mistake",
    ),
    101: (OutcomeKind.CRASH, "cloud-hypervisor panicked"),
}
_SIGNAL_CAUSES: dict[int, str] = {
    signal.SIGABRT: "a bug in it",
    signal.SIGSYS: "a system call that its sandbox forbids",
}


def plan_launch(vm: VmShape, leases: Leases, *, console: Console, binary: str) -> Launch:
    """argv of cloud-hypervisor; see docs/vmm.md for each option's reason."""
    _check_extra_args(vm)
    _check_devices(vm)
    fds = PassedFds()
    argv = [binary, *_LOG_LEVELS[vm.cloud_hypervisor.log_level]]
    argv += ["--api-socket", f"fd={fds.number(leases.monitor_fd)}"]
    argv += ["--seccomp", "true", *(("--landlock",) if leases.landlock else ())]
    argv += ["--cpus", f"boot={vm.cpus},nested=off"]
    argv += ["--memory", _plan_memory(vm)]
    argv += ["--balloon", "size=0,deflate_on_oom=on,free_page_reporting=on"]
    argv += ["--pvpanic", "--console", "tty" if console is Console.VIRTIO else "off"]
    argv += ["--serial", "tty" if console is Console.STDIO else "null"]
    argv += _vsock_args(leases)
    argv += _disk_args(leases.root, fds)
    argv += [word for value in plan_disks(leases, fds) for word in ("--disk", value)]
    argv += plan_net(leases, fds)
    argv += plan_vhost_user(vm, leases, fds)
    argv += plan_shares(leases, fds)
    argv += ["--kernel", fds.path(leases.kernel_fd)]
    if leases.initrd_fd is not None:
        argv += ["--initramfs", fds.path(leases.initrd_fd)]
    argv += ["--cmdline", plan_kernel_params(vm, leases, console=console)]
    argv += vm.cloud_hypervisor.extra_args
    # A helper of its own watches the console's terminal for a new size. It takes the terminal for a session
    # of its own unless it is that of cloud-hypervisor's, and a second one, after a reboot, could not (53.0).
    return Launch(tuple(argv), ENVIRONMENT, fds.passed(), own_terminal=console is Console.VIRTIO)


def _check_devices(vm: VmShape) -> None:
    for there, fact in (
        (bool(vm.pci), "pci_devices, which vmsilo does not pass to cloud-hypervisor"),
        (vm.usb, "USB, which cloud-hypervisor does not have"),
    ):
        if there:
            raise LaunchRefused(f"{vm.name} has {fact}", 'set vmm to "crosvm" or "qemu"')


def _plan_memory(vm: VmShape) -> str:
    # Shared, so that vhost-user backends can map it.
    words = [f"size={vm.memory_mib}M", "shared=on", "mergeable=off", "thp=on"]
    if vm.memory_max_mib is not None:
        words += ["hotplug_method=virtio-mem", f"hotplug_size={vm.memory_max_mib - vm.memory_mib}M"]
    return ",".join(words)


def _vsock_args(leases: Leases) -> list[str]:
    if not isinstance(leases.vsock, BuiltinVsock):
        raise LaunchRefused(f"{leases.name}: cloud-hypervisor has a vsock of its own and takes no other")
    socket = quote_cloud_hypervisor(leases.vsock.socket_path)
    return ["--vsock", f"cid={leases.vsock.cid},socket={socket}"]


def _disk_args(root: Disk | None, fds: PassedFds) -> list[str]:
    if root is None:
        return []
    path = fds.path(root.fd)
    if root.pmem:
        # A private mapping: what a guest writes to it is its own and never reaches the file.
        return ["--pmem", f"file={path},discard_writes=on"]
    access = "on" if root.readonly else "off"
    # It looks at the first bytes all the same, but with image_type it refuses what begins like another
    # format: else the guest could write a qcow2 header that names a file of the host.
    return ["--disk", f"path={path},readonly={access},image_type=raw,backing_files=off"]


def _check_extra_args(vm: VmShape) -> None:
    for arg in vm.cloud_hypervisor.extra_args:
        if "\0" in arg:
            raise BadOptionValue(f"cloud-hypervisor argument {arg!r} of {vm.name} holds a zero byte")
        option = arg.partition("=")[0]
        if option in _REFUSED_EXTRA:
            raise LaunchRefused(
                f"the cloud-hypervisor arguments of {vm.name} contain {arg}", _REFUSED_EXTRA[option]
            )


def explain_exit(code: int | None, number: int | None, *, guest_ran: bool = False) -> Outcome:
    """Exactly one of exit code and signal number is not None.

    A guest's reboot never ends cloud-hypervisor, and a panic is a reboot (`panic=-1`). It ends with 1 for
    every error of its own, so `guest_ran` tells a start that failed from a VM that crashed.
    """
    if number is not None:
        return explain_signal("cloud-hypervisor", number, _SIGNAL_CAUSES)
    if code in _EXITS:
        kind, message = _EXITS[code]
        return Outcome(kind, message)
    if code == 1 and guest_ran:
        return Outcome(OutcomeKind.CRASH, "cloud-hypervisor ended with an error while the guest ran")
    if code == 1:
        return Outcome(
            OutcomeKind.FAILED,
            "cloud-hypervisor could not start the VM; its last messages in the journal say why",
        )
    return Outcome(OutcomeKind.FAILED, f"cloud-hypervisor ended with the unknown exit code {code}")
