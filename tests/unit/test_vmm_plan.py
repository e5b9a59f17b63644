"""Launch plans against golden argv files, one argument per line. VMSILO_UPDATE_GOLDEN=1 rewrites them: read
the diff.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from vmsilod.errors import VmsiloError
from vmsilod.vmm import cloud_hypervisor, crosvm, qemu
from vmsilod.vmm.errors import BadOptionValue, LaunchRefused
from vmsilod.vmm.launch import (
    FD_BASE,
    BuiltinVsock,
    CloudHypervisorShape,
    Console,
    CrosvmShape,
    Disk,
    HybridVsock,
    KernelVsock,
    Launch,
    Leases,
    PciFunction,
    QemuShape,
    VhostUserDevice,
    VmShape,
)

if TYPE_CHECKING:
    from vmsilod.vmm.drivers import PlanLaunch

GOLDEN = Path(__file__).parent / "golden" / "vmm"

VM = VmShape("banking", memory_mib=1024, cpus=2)
KERNEL_VSOCK = KernelVsock(cid=42, device_fd=21)
HYBRID_VSOCK = HybridVsock(cid=42, vhost_socket="/run/vmsilo/vm/banking/vsock/vhost")
LEASES = Leases(
    name="banking",
    uid=60001,
    gid=60001,
    owner=1000,
    vsock=KERNEL_VSOCK,
    monitor_fd=20,
    kernel_fd=22,
    initrd_fd=23,
    kvm=True,
    empty_dir="/usr/local/lib/vmsilo/empty",
    root=Disk(fd=24, readonly=True),
)
HYBRID = replace(LEASES, vsock=HYBRID_VSOCK)
WRITABLE = replace(LEASES, root=Disk(fd=24, readonly=False))
ODD_NAMES = replace(LEASES, vsock=HybridVsock(cid=42, vhost_socket='/run/odd, "path"\\with [all]'))
EXTRA_PARAMS = replace(VM, kernel_params=("mitigations=auto", 'foo="a b"'))
MICROVM = replace(VM, qemu=QemuShape(machine="microvm"))
PCI = replace(VM, needs_pci=True, pci=(PciFunction("0000:01:00.0"), PciFunction("0000:02:00.1", iommu="on")))
Q35 = replace(VM, qemu=QemuShape(machine="q35"))

GROWING = replace(VM, memory_max_mib=4096, needs_pci=True)
BUILTIN = replace(
    LEASES,
    vsock=BuiltinVsock(cid=3, socket_path="/run/vmsilo/vm/banking/vsock/vsock"),
    root=Disk(fd=24, readonly=True, pmem=True),
    landlock=True,
)
SHARE = VhostUserDevice("fs", "/run/share.sock", (("tag", "home, sweet"), ("queue_size", 1024)))
NET = VhostUserDevice("net", "/run/net.sock", (("mac", "02:00:00:00:00:01"),))


def with_devices(*devices: VhostUserDevice) -> VmShape:
    return replace(VM, vhost_user=devices, needs_pci=True)


def with_sockets(leases: Leases, count: int) -> Leases:
    return replace(leases, vhost_user_fds=tuple(range(30, 30 + count)))


CROSVM_CASES = {
    "crosvm-kernel-vsock": (VM, LEASES, Console.NONE),
    "crosvm-hybrid-vsock": (VM, HYBRID, Console.NONE),
    "crosvm-writable-disk": (EXTRA_PARAMS, WRITABLE, Console.NONE),
    "crosvm-usb": (replace(VM, usb=True), LEASES, Console.NONE),
    "crosvm-console": (VM, LEASES, Console.VIRTIO),
    "crosvm-debug-console": (VM, LEASES, Console.STDIO),
    "crosvm-pci": (PCI, LEASES, Console.NONE),
    "crosvm-no-disk": (VM, replace(LEASES, root=None, initrd_fd=None), Console.NONE),
    "crosvm-odd-names": (replace(VM, name="a-very-long-name-of-a-vm"), ODD_NAMES, Console.NONE),
    "crosvm-extra-args": (
        replace(
            VM,
            crosvm=CrosvmShape(
                log_level="debug,disk=off",
                extra_args=("--syslog-tag", "x"),
                extra_run_args=("--hugepages",),
            ),
        ),
        LEASES,
        Console.NONE,
    ),
}
CROSVM_CASES["crosvm-vhost-user"] = (
    with_devices(
        VhostUserDevice("fs", "/run/share.sock", (("max-queue-size", 1024),)),
        VhostUserDevice("snd", "/run/sound.sock", (("pci-address", "00:10.0"),)),
    ),
    with_sockets(LEASES, 2),
    Console.NONE,
)
QEMU_CASES = {
    "qemu-memory-max": (GROWING, LEASES, Console.NONE),
    "qemu-vhost-user": (
        with_devices(
            VhostUserDevice("fs", "/run/share.sock", (("tag", "a,b"), ("queue-size", 1024))),
            replace(NET, options=(*NET.options, ("queues", 2), ("mq", True))),
            VhostUserDevice("blk", "/run/disk.sock"),
        ),
        with_sockets(LEASES, 3),
        Console.NONE,
    ),
    "qemu-microvm-tcg-hybrid": (MICROVM, replace(HYBRID, kvm=False), Console.NONE),
    "qemu-microvm-console": (VM, LEASES, Console.VIRTIO),
    "qemu-q35-console": (replace(VM, needs_pci=True), LEASES, Console.VIRTIO),
    "qemu-microvm-kvm-kernel-vsock": (VM, LEASES, Console.NONE),
    "qemu-q35-kvm-writable-disk": (Q35, WRITABLE, Console.NONE),
    "qemu-q35-tcg-hybrid": (VM, replace(HYBRID, kvm=False), Console.NONE),
    "qemu-pci": (PCI, LEASES, Console.NONE),
    "qemu-usb": (replace(VM, usb=True), LEASES, Console.NONE),
    "qemu-debug-console": (EXTRA_PARAMS, LEASES, Console.STDIO),
    "qemu-odd-names": (replace(VM, name="a,b=c"), ODD_NAMES, Console.NONE),
    "qemu-extra-args": (
        replace(VM, qemu=QemuShape(accel="tcg", extra_args=("-device", "virtio-serial-pci"))),
        replace(LEASES, initrd_fd=None),
        Console.NONE,
    ),
}


CLOUD_HYPERVISOR_CASES = {
    "cloud-hypervisor": (VM, BUILTIN, Console.NONE),
    "cloud-hypervisor-console": (EXTRA_PARAMS, BUILTIN, Console.STDIO),
    "cloud-hypervisor-disk": (
        VM,
        replace(BUILTIN, root=Disk(fd=24, readonly=True), landlock=False),
        Console.NONE,
    ),
    "cloud-hypervisor-writable-disk": (VM, replace(BUILTIN, root=Disk(fd=24, readonly=False)), Console.NONE),
    "cloud-hypervisor-memory-max": (GROWING, replace(BUILTIN, root=None, initrd_fd=None), Console.NONE),
    "cloud-hypervisor-odd-names": (
        VM,
        replace(BUILTIN, vsock=BuiltinVsock(3, '/run/odd, "path" [all]')),
        Console.NONE,
    ),
    "cloud-hypervisor-extra-args": (
        replace(VM, cloud_hypervisor=CloudHypervisorShape("debug", ("--watchdog",))),
        BUILTIN,
        Console.NONE,
    ),
    "cloud-hypervisor-vhost-user": (
        with_devices(
            SHARE,
            replace(NET, options=(*NET.options, ("offload_tso", False))),
            VhostUserDevice("block", "/run/disk.sock", (("num_queues", 2),)),
            VhostUserDevice("sound", "/run/sound.sock", (("queue_sizes", (64, 64, 64, 64)),)),
        ),
        with_sockets(BUILTIN, 4),
        Console.NONE,
    ),
}
ALL_CASES = CROSVM_CASES | QEMU_CASES | CLOUD_HYPERVISOR_CASES


def plan(case: str) -> Launch:
    if case in CLOUD_HYPERVISOR_CASES:
        vm, leases, console = CLOUD_HYPERVISOR_CASES[case]
        return cloud_hypervisor.plan_launch(vm, leases, console=console, binary="/usr/bin/cloud-hypervisor")
    if case in CROSVM_CASES:
        vm, leases, console = CROSVM_CASES[case]
        return crosvm.plan_launch(vm, leases, console=console, binary="/usr/bin/crosvm")
    vm, leases, console = QEMU_CASES[case]
    return qemu.plan_launch(vm, leases, console=console, binary="/usr/bin/qemu-system-x86_64")


@pytest.mark.parametrize("case", ALL_CASES)
def test_argv_is_the_golden_one(case: str) -> None:
    launch = plan(case)
    numbered = [f"# fd {FD_BASE + i} = {fd}" for i, fd in enumerate(launch.fds)]
    text = "\n".join([*numbered, *launch.argv]) + "\n"
    golden = GOLDEN / f"{case}.txt"
    if os.environ.get("VMSILO_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(ALL_CASES)


# Where crosvm.md describes each option; the value says whether it takes an argument.
CROSVM_GLOBAL = {"--log-level": True, "--no-syslog": False, "--extended-status": False}  # 1.1
CROSVM_RUN = {
    "--name": True,  # 1.3
    "--mem": True,  # 1.3
    "--cpus": True,  # 1.3
    "--nested": True,  # 1.3
    "--no-usb": False,  # 1.3
    "--initrd": True,  # 1.3
    "--params": True,  # 1.3
    "--block": True,  # 1.4
    "--vsock": True,  # 1.6
    "--vhost-user": True,  # 1.7
    "--vhost-user-connect-timeout-ms": True,  # 1.7
    "--serial": True,  # 1.11
    "--vfio": True,  # 1.14
    "--socket": True,  # 1.15
    "--pivot-root": True,  # 1.16
}
CROSVM_KEYS = {
    "--mem": {"size"},
    "--cpus": {"num-cores"},
    "--nested": {"off"},
    "--block": {"path", "ro", "lock"},
    "--vsock": {"cid", "device"},
    "--vhost-user": {"vsock", "fs", "sound", "socket", "max-queue-size", "pci-address"},
    "--serial": {"type", "hardware", "num", "console", "stdin"},
}


@pytest.mark.parametrize(
    "case", [case for case in CROSVM_CASES if case not in {"crosvm-extra-args", "crosvm-odd-names"}]
)
def test_crosvm_options_are_in_its_grammar(case: str) -> None:
    _, *argv = plan(case).argv
    run = argv.index("run")
    assert read_options(argv[:run], CROSVM_GLOBAL) == []
    positional = read_options(argv[run + 1 :], CROSVM_RUN)
    assert len(positional) == 1
    assert positional[0].startswith("/proc/self/fd/")


def read_options(argv: list[str], grammar: dict[str, bool]) -> list[str]:
    rest = list(argv)
    seen: set[str] = set()
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        assert option in grammar
        repeatable = option in ("--serial", "--vfio", "--vhost-user")
        assert option not in seen or repeatable, "crosvm refuses a repeated single option"
        seen.add(option)
        if not grammar[option]:
            continue
        value = rest.pop(0)
        assert not value.startswith("-")
        for pair in value.split(",") if option in CROSVM_KEYS else []:
            assert pair.partition("=")[0] in CROSVM_KEYS[option]
    return rest


@pytest.mark.parametrize("case", ALL_CASES)
def test_every_descriptor_in_the_argv_is_passed_and_none_else(case: str) -> None:
    launch = plan(case)
    _, leases, _ = ALL_CASES[case]
    wanted = {leases.monitor_fd, leases.kernel_fd, *leases.vhost_user_fds}
    wanted |= {leases.initrd_fd} if leases.initrd_fd is not None else set()
    wanted |= {leases.root.fd} if leases.root else set()
    wanted |= {leases.vsock.device_fd} if isinstance(leases.vsock, KernelVsock) else set()
    assert set(launch.fds) == wanted
    assert len(launch.fds) == len(wanted)
    line = " ".join(launch.argv)
    for number in range(FD_BASE, FD_BASE + len(launch.fds)):
        assert f"/fd/{number}" in line or f"fd={number}" in line


@pytest.mark.parametrize(
    "shape",
    [
        CrosvmShape(extra_args=("--disable-sandbox",)),
        CrosvmShape(extra_run_args=("--disable-sandbox",)),
        CrosvmShape(extra_run_args=("--disable-sandbox=true",)),
        CrosvmShape(extra_run_args=("a\0b",)),
        CrosvmShape(log_level="--disable-sandbox"),
        CrosvmShape(log_level=""),
    ],
)
def test_crosvm_without_sandbox_is_refused(shape: CrosvmShape) -> None:
    with pytest.raises(LaunchRefused):
        crosvm.plan_launch(replace(VM, crosvm=shape), LEASES, console=Console.NONE, binary="crosvm")


@pytest.mark.parametrize("extra", ["-sandbox", "--sandbox", "-daemonize"])
def test_qemu_without_sandbox_is_refused(extra: str) -> None:
    vm = replace(VM, qemu=QemuShape(extra_args=(extra, "off")))
    with pytest.raises(LaunchRefused) as caught:
        qemu.plan_launch(vm, LEASES, console=Console.NONE, binary="qemu")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("vm", "leases"),
    [
        (replace(MICROVM, needs_pci=True), LEASES),
        (replace(VM, qemu=QemuShape(accel="kvm")), replace(LEASES, kvm=False)),
        (replace(VM, name="-name"), LEASES),
        (replace(VM, kernel_params=("x" * 2048,)), LEASES),
        (replace(VM, kernel_params=("a\nb",)), LEASES),
        (replace(VM, kernel_params=("",)), LEASES),
        (replace(VM, kernel_params=("ä",)), LEASES),
        (VM, replace(LEASES, kernel_fd=-1)),
    ],
)
def test_impossible_vm_is_refused(vm: VmShape, leases: Leases) -> None:
    with pytest.raises(VmsiloError):
        qemu.plan_launch(vm, leases, console=Console.NONE, binary="qemu")


def test_a_pci_device_takes_the_vm_off_microvm() -> None:
    assert qemu.choose_machine(VM, kvm=True) == "microvm"
    assert qemu.choose_machine(replace(VM, needs_pci=True), kvm=True) == "q35"


def test_crosvm_with_memory_max_is_refused_with_a_way_out() -> None:
    with pytest.raises(LaunchRefused) as caught:
        crosvm.plan_launch(GROWING, LEASES, console=Console.NONE, binary="crosvm")
    assert "cloud-hypervisor" in caught.value.hint


@pytest.mark.parametrize("extra", ["--seccomp", "--seccomp=false", "--api-socket", "a\0b"])
def test_cloud_hypervisor_without_seccomp_is_refused(extra: str) -> None:
    vm = replace(VM, cloud_hypervisor=CloudHypervisorShape(extra_args=(extra, "false")))
    with pytest.raises(LaunchRefused):
        cloud_hypervisor.plan_launch(vm, BUILTIN, console=Console.NONE, binary="cloud-hypervisor")


@pytest.mark.parametrize("vm", [PCI, replace(VM, usb=True)])
def test_cloud_hypervisor_with_devices_of_the_host_is_refused(vm: VmShape) -> None:
    with pytest.raises(LaunchRefused):
        cloud_hypervisor.plan_launch(vm, BUILTIN, console=Console.NONE, binary="cloud-hypervisor")


@pytest.mark.parametrize("leases", [LEASES, HYBRID])
def test_cloud_hypervisor_takes_no_vsock_but_its_own(leases: Leases) -> None:
    with pytest.raises(LaunchRefused):
        cloud_hypervisor.plan_launch(VM, leases, console=Console.NONE, binary="cloud-hypervisor")


@pytest.mark.parametrize("plan_launch", [crosvm.plan_launch, qemu.plan_launch])
def test_others_have_no_vsock_of_their_own(plan_launch: PlanLaunch) -> None:
    with pytest.raises(LaunchRefused):
        plan_launch(VM, BUILTIN, console=Console.NONE, binary="vmm")


@pytest.mark.parametrize(
    ("device", "word"),
    [
        (VhostUserDevice("vsock", "/s"), "its types are"),
        (VhostUserDevice("floppy", "/s"), "its types are"),
        (VhostUserDevice("fs", "/s", (("chardev", "x"),)), "leave it out"),
        (VhostUserDevice("fs", "/s", (("a,b", "x"),)), ""),
        (VhostUserDevice("fs", "/s", (("tag", "a\nb"),)), ""),
    ],
)
def test_vhost_user_device_that_cannot_be_is_refused(device: VhostUserDevice, word: str) -> None:
    with pytest.raises(LaunchRefused) as caught:
        qemu.plan_launch(with_devices(device), with_sockets(LEASES, 1), console=Console.NONE, binary="qemu")
    assert word in caught.value.hint


def test_users_kernel_params_come_last() -> None:
    argv = crosvm.plan_launch(EXTRA_PARAMS, LEASES, console=Console.NONE, binary="crosvm").argv
    assert argv[argv.index("--params") + 1].endswith(' mitigations=auto foo="a b"')


def test_control_characters_in_a_socket_path_are_refused() -> None:
    leases = replace(LEASES, vsock=HybridVsock(42, "/run/a\nb"))
    with pytest.raises(BadOptionValue):
        crosvm.plan_launch(VM, leases, console=Console.NONE, binary="crosvm")
