"""Which VMM a VM gets on this host, and whether KVM can be used.

Called by the lifecycle before it acquires anything, and by `vmsilo check`. probe_kvm opens /dev/kvm and
closes it again; nothing is kept.
"""

from __future__ import annotations

import enum
import fcntl
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vmsilod.vmm.errors import KvmNeeded, MissingVmm

if TYPE_CHECKING:
    from collections.abc import Callable

KVM_GET_API_VERSION = 0xAE00
"""_IO(KVMIO, 0x00), KVMIO being 0xAE (linux/kvm.h)."""
KVM_CREATE_VM = 0xAE01
KVM_API_VERSION = 12

TCG_WARNING = (
    "VMs run without hardware virtualisation (QEMU TCG): ten times slower or worse, and QEMU's security"
    " promises do not cover TCG, so do not trust such a VM to contain hostile programs"
)
_KVM_HINT = "switch on virtualisation in the firmware and load kvm_intel or kvm_amd, or use qemu"


class VmmKind(enum.Enum):
    CROSVM = "crosvm"
    QEMU = "qemu"
    CLOUD_HYPERVISOR = "cloud-hypervisor"


BINARIES = {
    VmmKind.CROSVM: "crosvm",
    VmmKind.QEMU: "qemu-system-x86_64",
    VmmKind.CLOUD_HYPERVISOR: "cloud-hypervisor",
}
_NEED_KVM = frozenset({VmmKind.CROSVM, VmmKind.CLOUD_HYPERVISOR})
_HINTS = {
    VmmKind.CROSVM: "crosvm has no Debian package: build it, put it into /usr/local/bin, or set vmm to qemu",
    VmmKind.QEMU: "install the package qemu-system-x86 (Debian) or your distribution's equal",
    VmmKind.CLOUD_HYPERVISOR: "put cloud-hypervisor (its project releases static binaries) into"
    " /usr/local/bin, or set vmm to qemu",
}


@dataclass(frozen=True)
class VmmChoice:
    kind: VmmKind
    binary: str
    """Absolute path."""
    reason: str


@dataclass(frozen=True)
class KvmStatus:
    usable: bool
    reason: str


def choose_vmm(
    wanted: Literal["auto", "crosvm", "qemu", "cloud-hypervisor"],
    *,
    kvm: bool = True,
    grows: bool = False,
    find: Callable[[str], str | None] = shutil.which,
) -> VmmChoice:
    """`find` is like shutil.which; `kvm` is probe_kvm's answer; `grows`: the VM has a memory_max. Raises
    MissingVmm and KvmNeeded.
    """
    if wanted == "auto":
        return _choose_auto(kvm=kvm, grows=grows, find=find)
    kind = VmmKind(wanted)
    binary = find(BINARIES[kind])
    if binary is None:
        raise MissingVmm(f"{BINARIES[kind]} is not installed", _HINTS[kind])
    if kind in _NEED_KVM and not kvm:
        raise KvmNeeded(f"{kind.value} needs KVM, which cannot be used on this host", _KVM_HINT)
    return VmmChoice(kind, binary, f"{kind.value} is configured")


def _choose_auto(*, kvm: bool, grows: bool, find: Callable[[str], str | None]) -> VmmChoice:
    crosvm, qemu = find(BINARIES[VmmKind.CROSVM]), find(BINARIES[VmmKind.QEMU])
    if crosvm and kvm and not grows:
        return VmmChoice(VmmKind.CROSVM, crosvm, "crosvm is installed")
    if qemu:
        reason = "crosvm is not installed, qemu is"
        if crosvm:
            reason = "crosvm cannot plug memory in" if kvm else "crosvm is installed but needs KVM"
        return VmmChoice(VmmKind.QEMU, qemu, reason)
    if crosvm and kvm:
        raise MissingVmm(
            "memory_max needs qemu-system-x86_64: crosvm cannot plug memory in", _HINTS[VmmKind.QEMU]
        )
    if crosvm:
        raise KvmNeeded("crosvm needs KVM, which cannot be used on this host", _KVM_HINT)
    hint = f"{_HINTS[VmmKind.QEMU]}; {_HINTS[VmmKind.CROSVM].partition(':')[0]}"
    raise MissingVmm("neither crosvm nor qemu-system-x86_64 is installed", hint)


def probe_kvm(path: str = "/dev/kvm") -> KvmStatus:
    """Whether this process may make a KVM VM. It says nothing of another uid's right to open the node."""
    try:
        kvm = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        return KvmStatus(usable=False, reason=f"{path} cannot be opened: {exc.strerror}")
    try:
        return _probe_open_kvm(path, kvm)
    finally:
        os.close(kvm)


def _probe_open_kvm(path: str, kvm: int) -> KvmStatus:
    try:
        version = fcntl.ioctl(kvm, KVM_GET_API_VERSION, 0)
    except OSError as exc:
        return KvmStatus(usable=False, reason=f"{path} is not KVM: {exc.strerror}")
    if version != KVM_API_VERSION:
        return KvmStatus(
            usable=False, reason=f"{path} has API version {version} instead of {KVM_API_VERSION}"
        )
    try:
        os.close(fcntl.ioctl(kvm, KVM_CREATE_VM, 0))
    except OSError as exc:
        return KvmStatus(usable=False, reason=f"{path} makes no VM: {exc.strerror}")
    return KvmStatus(usable=True, reason=f"{path} works")
