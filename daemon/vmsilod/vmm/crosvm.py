"""The crosvm driver: its argv, and what its exit codes mean.

plan_launch and explain_exit are pure and called by the lifecycle; crosvm_control.py talks to a crosvm that
runs. The grammar is that of crosvm's main branch from July 2026 on (`--nested` is the newest option used).
Never emits --disable-sandbox.
"""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING

from vmsilod.vmm.disks import plan_crosvm as plan_disks
from vmsilod.vmm.errors import BadOptionValue, LaunchRefused
from vmsilod.vmm.escape import check_argument, quote_crosvm
from vmsilod.vmm.kernel_params import plan_kernel_params
from vmsilod.vmm.launch import ENVIRONMENT, Console, HybridVsock, KernelVsock, Launch, PassedFds
from vmsilod.vmm.net import plan_crosvm as plan_net
from vmsilod.vmm.outcome import Outcome, OutcomeKind, explain_signal
from vmsilod.vmm.shares import plan_crosvm as plan_shares
from vmsilod.vmm.vhost_user import plan_crosvm as plan_vhost_user

if TYPE_CHECKING:
    from vmsilod.vmm.launch import Disk, Leases, VmShape

# vhost-device-vsock refuses crosvm's default of 32768 (rust-vmm/vhost-device issue 458).
VHOST_USER_QUEUE_SIZE = 1024
# The backend is listening before; this only covers a restart of it between the check and the connect.
VHOST_USER_CONNECT_TIMEOUT_MS = 5000

_LOG_LEVEL = re.compile(r"[a-z][A-Za-z0-9_:=,-]*")
_COMM_LENGTH = 15

_EXITS = {
    0: (OutcomeKind.STOPPED, "the guest powered off, or the VM was stopped"),
    1: (OutcomeKind.FAILED, "crosvm could not start the VM; its last messages in the journal say why"),
    32: (OutcomeKind.RESET, "the guest rebooted"),
    33: (OutcomeKind.CRASH, "a vCPU or a device process of crosvm died"),
    34: (OutcomeKind.PANIC, "the guest's kernel panicked"),
    35: (
        OutcomeKind.BAD_ARGUMENTS,
        "crosvm does not know one of its arguments: it is older than July 2026, or extra_args has a mistake",
    ),
    36: (OutcomeKind.WATCHDOG, "the guest's watchdog ran out"),
}
_SIGNAL_CAUSES: dict[int, str] = {
    signal.SIGABRT: "a bug in it, or its sandbox was refused (it needs user namespaces)",
    signal.SIGSYS: "a system call that its sandbox forbids",
}


def plan_launch(vm: VmShape, leases: Leases, *, console: Console, binary: str) -> Launch:
    """argv of `crosvm run`; see docs/vmm.md for each option's reason."""
    _check_extra_args(vm)
    if vm.memory_max_mib is not None:
        raise LaunchRefused(
            f"{vm.name} has memory_max, and crosvm cannot plug memory in",
            'set vmm to "cloud-hypervisor" or "qemu", or leave memory_max out',
        )
    fds = PassedFds()
    argv = [binary, "--log-level", _check_log_level(vm.crosvm.log_level), "--no-syslog", "--extended-status"]
    argv += [*vm.crosvm.extra_args, "run"]
    argv += ["--name", check_argument(vm.name)[:_COMM_LENGTH]]
    argv += ["--socket", fds.path(leases.monitor_fd)]
    argv += ["--mem", f"size={vm.memory_mib}", "--cpus", f"num-cores={vm.cpus}"]
    argv += ["--nested", "off", *([] if vm.usb else ["--no-usb"])]
    argv += ["--pivot-root", check_argument(leases.empty_dir)]
    argv += _vsock_args(leases, fds)
    argv += _disk_args(leases.root, fds)
    argv += plan_disks(leases, fds)
    argv += plan_net(leases, fds)
    argv += plan_vhost_user(vm, leases, fds)
    argv += plan_shares(leases, fds)
    argv += _pci_args(vm)
    argv += _console_args(console)
    if leases.initrd_fd is not None:
        argv += ["--initrd", fds.path(leases.initrd_fd)]
    # crosvm itself puts panic=-1 first.
    params = plan_kernel_params(vm, leases, console=console, vmm_params=("i8042.noaux", "i8042.nokbd"))
    argv += ["--params", params]
    argv += [*vm.crosvm.extra_run_args, fds.path(leases.kernel_fd)]
    return Launch(tuple(argv), ENVIRONMENT, fds.passed())


def _vsock_args(leases: Leases, fds: PassedFds) -> list[str]:
    vsock = leases.vsock
    if isinstance(vsock, KernelVsock):
        return ["--vsock", f"cid={vsock.cid},device={fds.path(vsock.device_fd)}"]
    if not isinstance(vsock, HybridVsock):
        raise LaunchRefused(f"{leases.name}: crosvm has no vsock of its own")
    socket = quote_crosvm(vsock.vhost_socket)
    return [
        "--vhost-user",
        f"vsock,socket={socket},max-queue-size={VHOST_USER_QUEUE_SIZE}",
        "--vhost-user-connect-timeout-ms",
        str(VHOST_USER_CONNECT_TIMEOUT_MS),
    ]


def _disk_args(root: Disk | None, fds: PassedFds) -> list[str]:
    if root is None:
        return []
    if root.pmem:
        return ["--pmem", f"path={fds.path(root.fd)},ro=true"]
    # flock(2), exclusive, for a writable one. None for an image, which everybody may read: who may read a
    # file may lock it, and crosvm would not start beside such a lock.
    ro, lock = ("true", "false") if root.readonly else ("false", "true")
    return ["--block", f"path={fds.path(root.fd)},ro={ro},lock={lock}"]


def _pci_args(vm: VmShape) -> list[str]:
    args = []
    for function in vm.pci:
        iommu = "viommu" if function.iommu == "on" else "off"
        args += ["--vfio", f"{quote_crosvm(function.sysfs)},iommu={iommu}"]
    return args


def _console_args(console: Console) -> list[str]:
    if console is Console.STDIO:
        return ["--serial", "type=stdout,hardware=serial,num=1,stdin=true"]
    # Without a first serial port of ours crosvm would make one on its standard input and output.
    sink = ["--serial", "type=sink,hardware=serial,num=1"]
    if console is Console.NONE:
        return sink
    return [*sink, "--serial", "type=stdout,hardware=virtio-console,num=1,stdin=true"]


def _check_log_level(level: str) -> str:
    if not _LOG_LEVEL.fullmatch(level):
        raise BadOptionValue(f"{level!r} is not a crosvm log level", "such as info, debug or debug,disk=off")
    return level


def _check_extra_args(vm: VmShape) -> None:
    for arg in (*vm.crosvm.extra_args, *vm.crosvm.extra_run_args):
        if "\0" in arg:
            raise BadOptionValue(f"crosvm argument {arg!r} of {vm.name} holds a zero byte")
        if arg.partition("=")[0] == "--disable-sandbox":
            raise LaunchRefused(
                f"the crosvm arguments of {vm.name} turn crosvm's sandbox off",
                "remove --disable-sandbox; vmsilo never runs crosvm without its sandbox",
            )


def explain_exit(code: int | None, number: int | None, *, guest_ran: bool = False) -> Outcome:
    """Exactly one of exit code and signal number is not None. crosvm tells the cases apart itself, whether
    or not the guest ran.
    """
    if number is not None:
        return explain_signal("crosvm", number, _SIGNAL_CAUSES)
    if code in _EXITS:
        kind, message = _EXITS[code]
        return Outcome(kind, message)
    ran = "while the VM ran" if guest_ran else "before the VM ran"
    return Outcome(OutcomeKind.FAILED, f"crosvm ended with the unknown exit code {code} {ran}")
