"""The QEMU driver (x86): its argv for the machines microvm and q35, under KVM or TCG, and what its exit
codes mean.

plan_launch and explain_exit are pure and called by the lifecycle; qmp.py talks to a QEMU that runs. Written
for QEMU 10, with no option newer than 7.2. Never starts QEMU without its seccomp sandbox.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from vmsilod.vmm.disks import plan_qemu as plan_disks
from vmsilod.vmm.errors import BadOptionValue, LaunchRefused
from vmsilod.vmm.escape import check_argument, quote_qemu
from vmsilod.vmm.kernel_params import plan_kernel_params
from vmsilod.vmm.launch import ENVIRONMENT, Console, HybridVsock, KernelVsock, Launch, PassedFds
from vmsilod.vmm.net import plan_qemu as plan_net
from vmsilod.vmm.outcome import Outcome, OutcomeKind, explain_signal
from vmsilod.vmm.qmp import HOTPLUG_ID
from vmsilod.vmm.qmp_usb import USB_ID
from vmsilod.vmm.shares import plan_qemu as plan_shares
from vmsilod.vmm.vhost_user import plan_qemu as plan_vhost_user

if TYPE_CHECKING:
    from vmsilod.vmm.launch import Disk, Leases, VmShape

BALLOON_ID = "balloon0"
PMEM_ROOM_MIB = 1024

_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# No guest page in a core dump of the VMM, and none merged with another VM's (a timing channel between VMs).
_MACHINE_MEMORY = "memory-backend=mem0,dump-guest-core=off,mem-merge=off"
_MACHINES = {
    # ACPI, for its power button (GED) and for finding the virtio-mmio devices; rtc because the guest's clock
    # starts from it.
    "microvm": "microvm,acpi=on,rtc=on,pcie=off,usb=off,graphics=off",
    "q35": "q35,usb=off,sata=off,smbus=off,vmport=off,i8042=off,graphics=off",
}
_REFUSED_EXTRA = {
    "sandbox": "vmsilo never runs QEMU without its sandbox",
    "daemonize": "QEMU must stay the main process of its unit",
}

_SIGNAL_CAUSES: dict[int, str] = {
    signal.SIGABRT: "a bug in it",
    signal.SIGSYS: "a system call that its sandbox forbids",
}


def plan_launch(vm: VmShape, leases: Leases, *, console: Console, binary: str) -> Launch:
    """argv of qemu-system-x86_64; see docs/vmm.md for each option's reason."""
    _check_extra_args(vm)
    kvm = uses_kvm(vm, leases)
    machine = choose_machine(vm, kvm=kvm, pmem=_has_pmem(leases))
    fds = PassedFds()
    argv = [binary, "-nodefaults", "-no-user-config", "-display", "none", "-sandbox", _SANDBOX]
    argv += [
        "-msg",
        "timestamp=off",
        "-name",
        f"guest={quote_qemu(check_argument(vm.name))},debug-threads=on",
    ]
    argv += _machine_args(vm, machine, console, kvm=kvm)
    argv += _memory_args(vm, leases.root)
    argv += ["-kernel", fds.path(leases.kernel_fd)]
    if leases.initrd_fd is not None:
        argv += ["-initrd", fds.path(leases.initrd_fd)]
    argv += [
        "-append",
        plan_kernel_params(vm, leases, console=console, vmm_params=_kernel_params(vm, leases)),
    ]
    bus = "device" if machine == "microvm" else "pci"
    # The first virtio-blk device is the guest's vda.
    argv += _disk_args(leases.root, fds, bus)
    argv += plan_disks(leases, fds, bus)
    argv += _vsock_args(leases, fds, bus)
    argv += _hotplug_args(vm)
    argv += plan_net(leases, fds, machine)
    argv += plan_vhost_user(vm, leases, fds)
    argv += plan_shares(leases, fds, bus)
    argv += _pci_args(vm)
    if vm.usb:
        # For devices of the host, by QMP; eight ports of either speed.
        argv += ["-device", f"qemu-xhci,id={USB_ID},p2=8,p3=8"]
    argv += ["-device", f"virtio-rng-{bus}"]
    argv += ["-device", f"virtio-balloon-{bus},id={BALLOON_ID},deflate-on-oom=on,free-page-reporting=on"]
    argv += ["-device", "pvpanic" if machine == "microvm" else "pvpanic-pci"]
    argv += ["-action", "reboot=reset,shutdown=poweroff,panic=exit-failure"]
    argv += ["-chardev", f"socket,id=mon0,fd={fds.number(leases.monitor_fd)},server=on,wait=off"]
    argv += ["-mon", "chardev=mon0,mode=control"]
    argv += _console_args(console, bus)
    argv += vm.qemu.extra_args
    return Launch(tuple(argv), ENVIRONMENT, fds.passed())


def choose_machine(vm: VmShape, *, kvm: bool, pmem: bool = False) -> str:
    """microvm where nothing speaks against it: less firmware, and fewer emulated devices to attack.

    Under TCG it is q35: microvm has neither HPET nor PM timer, so a guest without KVM's clock boots only if
    it can calibrate its TSC against the PIT, which mostly failed on a busy host (QEMU 10.0.13, Linux 6.12).
    """
    needs_pci = vm.needs_pci or vm.usb or pmem
    if vm.qemu.machine == "microvm" and needs_pci:
        raise LaunchRefused(
            f"{vm.name} has a device that needs PCI, and machine microvm has none",
            'set machine to "q35" or "auto"',
        )
    if vm.qemu.machine == "auto":
        return "microvm" if kvm and not needs_pci else "q35"
    return vm.qemu.machine


def uses_kvm(vm: VmShape, leases: Leases) -> bool:
    if vm.qemu.accel == "kvm" and not leases.kvm:
        raise LaunchRefused(
            f"{vm.name} asks for KVM, which cannot be used on this host", 'or set accel to "auto"'
        )
    return leases.kvm and vm.qemu.accel != "tcg"


def _machine_args(vm: VmShape, machine: str, console: Console, *, kvm: bool) -> list[str]:
    options = f"{_MACHINES[machine]},{_MACHINE_MEMORY}"
    if machine == "microvm" and console is not Console.STDIO:
        options += ",isa-serial=off"
    # Like crosvm's `--nested off`: no virtualisation inside the guest.
    cpu = "host,vmx=off,svm=off" if kvm else "max,vmx=off,svm=off"
    return [
        *("-machine", options),
        *("-accel", "kvm" if kvm else "tcg,thread=multi"),
        *("-cpu", cpu),
        *("-smp", str(vm.cpus)),
    ]


def _memory_args(vm: VmShape, root: Disk | None) -> list[str]:
    size = f"{vm.memory_mib}M"
    highest = vm.memory_max_mib or vm.memory_mib
    if root is not None and root.pmem:
        # Persistent memory has its place above the memory, with some room to begin at a round address.
        highest += (root.size >> 20) + PMEM_ROOM_MIB
    if highest > vm.memory_mib:
        size += f",maxmem={highest}M"
    # Shared, so that vhost-user backends (vsock, virtiofsd) can map it.
    return ["-m", size, "-object", f"memory-backend-memfd,id=mem0,size={vm.memory_mib}M,share=on"]


def _has_pmem(leases: Leases) -> bool:
    return leases.root is not None and leases.root.pmem


def _kernel_params(vm: VmShape, leases: Leases) -> tuple[str, ...]:
    # Memory above 4 GiB makes Linux set 64 MiB aside for devices that reach no higher. There are none but
    # those of the host.
    return ("swiotlb=512",) if _has_pmem(leases) and not vm.pci else ()


def _console_args(console: Console, bus: str) -> list[str]:
    if console is Console.NONE:
        return []
    # signal=off: Ctrl-C is the guest's.
    stdio = ["-chardev", "stdio,id=console0,signal=off"]
    if console is Console.STDIO:
        return [*stdio, "-serial", "chardev:console0"]
    # A serial port costs an exit per byte, at boot too; a virtio console one per line.
    return [*stdio, "-device", f"virtio-serial-{bus},max_ports=1", "-device", "virtconsole,chardev=console0"]


def _disk_args(root: Disk | None, fds: PassedFds, bus: str) -> list[str]:
    if root is None:
        return []
    if root.pmem:
        backend = f"memory-backend-file,id=root0,mem-path={fds.path(root.fd)},size={root.size}"
        return [
            *("-object", f"{backend},share=on,readonly=on"),
            *("-device", "virtio-pmem-pci,memdev=root0,id=pmem-root"),
        ]
    number = fds.number(root.fd)
    access = "read-only=on" if root.readonly else "read-only=off,discard=unmap"
    # driver=raw: without it QEMU would probe, and the guest could write a qcow2 header that names a file of
    # the host.
    return [
        *("-add-fd", f"fd={number},set={number}"),
        *(
            "-blockdev",
            f"driver=raw,node-name=root0,{access},file.driver=file,file.filename=/dev/fdset/{number}",
        ),
        *("-device", f"virtio-blk-{bus},drive=root0"),
    ]


def _hotplug_args(vm: VmShape) -> list[str]:
    """The memory between memory and memory_max, none of it plugged in at first."""
    if vm.memory_max_mib is None:
        return []
    size = vm.memory_max_mib - vm.memory_mib
    return [
        *("-object", f"memory-backend-memfd,id=mem-{HOTPLUG_ID},size={size}M,share=on,reserve=off"),
        *("-device", f"virtio-mem-pci,id={HOTPLUG_ID},memdev=mem-{HOTPLUG_ID},requested-size=0"),
    ]


def _vsock_args(leases: Leases, fds: PassedFds, bus: str) -> list[str]:
    vsock = leases.vsock
    if isinstance(vsock, KernelVsock):
        number = fds.number(vsock.device_fd)
        return ["-device", f"vhost-vsock-{bus},guest-cid={vsock.cid},vhostfd={number}"]
    if not isinstance(vsock, HybridVsock):
        raise LaunchRefused(f"{leases.name}: QEMU has no vsock of its own")
    return [
        *("-chardev", f"socket,id=vsock0,path={quote_qemu(vsock.vhost_socket)}"),
        *("-device", f"vhost-user-vsock-{bus},chardev=vsock0"),
    ]


def _pci_args(vm: VmShape) -> list[str]:
    args = []
    if any(function.iommu == "on" for function in vm.pci):
        # caching-mode: QEMU must see each mapping that the guest makes, to make it in the host's IOMMU.
        # Without interrupt remapping the interrupt controller can stay in KVM.
        args += ["-device", "intel-iommu,caching-mode=on,intremap=off"]
    for function in vm.pci:
        args += ["-device", f"vfio-pci,host={quote_qemu(function.address)}"]
    return args


def _check_extra_args(vm: VmShape) -> None:
    for arg in vm.qemu.extra_args:
        if "\0" in arg:
            raise BadOptionValue(f"QEMU argument {arg!r} of {vm.name} holds a zero byte")
        # QEMU takes -option and --option alike.
        option = arg.removeprefix("-").removeprefix("-") if arg.startswith("-") else ""
        if option in _REFUSED_EXTRA:
            raise LaunchRefused(f"the QEMU arguments of {vm.name} contain {arg}", _REFUSED_EXTRA[option])


def explain_exit(code: int | None, number: int | None, *, guest_ran: bool = False) -> Outcome:
    """Exactly one of exit code and signal number is not None.

    QEMU ends with 1 both for a VM that it could not start and for a panic of the guest (-action
    panic=exit-failure), so `guest_ran` (its main loop was seen to run, or the guest announced itself) tells
    the two apart. A guest's reboot never ends QEMU.
    """
    if number is not None:
        return explain_signal("QEMU", number, _SIGNAL_CAUSES)
    if code == 0:
        return Outcome(OutcomeKind.STOPPED, "the guest powered off, or the VM was stopped")
    if code == 1 and guest_ran:
        return Outcome(
            OutcomeKind.PANIC,
            "QEMU ended with 1 while the guest ran: its kernel panicked",
            "the guest's console says more: vm-start-debug",
        )
    if code == 1:
        return Outcome(
            OutcomeKind.FAILED,
            "QEMU could not start the VM (its last messages in the journal say why),"
            " or the guest's kernel panicked while it booted",
        )
    return Outcome(OutcomeKind.FAILED, f"QEMU ended with the unknown exit code {code}")
