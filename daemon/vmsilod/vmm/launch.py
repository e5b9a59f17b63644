"""What goes into a VMM driver and what comes out of it.

A driver's plan_launch is a pure function (VmShape, Leases, console, binary) -> Launch: it opens nothing and
asks nothing of the machine. The lifecycle makes VmShape from the configuration and Leases from the resources
it acquired, and hands the Launch to the launcher, which execs it. The descriptors in Leases stay their
owner's: a Launch only says which of them travel, and at which number.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

from vmsilod.vmm.errors import LaunchRefused

FD_BASE = 3
"""Number of the first passed descriptor in the VMM, as with sd_listen_fds(3)."""

HOST_CID = 2
HOST_PORT = 701

ENVIRONMENT = (("LANG", "C.UTF-8"), ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"))


class Console(enum.Enum):
    """Where the bytes of the guest's serial console go."""

    NONE = "none"
    """Nowhere: vmsilo-consoled could not take them."""
    VIRTIO = "virtio"
    """The VMM's standard input and output are a terminal whose other side vmsilo-consoled has; in the guest
    it is a virtio console (hvc0).
    """
    STDIO = "stdio"
    """They are the terminal of vm-start-debug; in the guest it is the first serial port (ttyS0), which shows
    a kernel from its first word on.
    """


@dataclass(frozen=True)
class CrosvmShape:
    log_level: str = "info"
    extra_args: tuple[str, ...] = ()
    extra_run_args: tuple[str, ...] = ()


@dataclass(frozen=True)
class QemuShape:
    extra_args: tuple[str, ...] = ()
    accel: Literal["auto", "kvm", "tcg"] = "auto"
    machine: Literal["auto", "microvm", "q35"] = "auto"


@dataclass(frozen=True)
class CloudHypervisorShape:
    log_level: Literal["warn", "info", "debug", "trace"] = "warn"
    extra_args: tuple[str, ...] = ()


OptionValue = str | int | bool | tuple[int, ...]


@dataclass(frozen=True)
class VhostUserDevice:
    """A device whose other end is a program of the host; `options` as configured, in that order."""

    type: str
    socket: str
    options: tuple[tuple[str, OptionValue], ...] = ()


@dataclass(frozen=True)
class PciFunction:
    """A PCI function of the host that the VM gets; `iommu`: the guest has an IOMMU before it."""

    address: str
    """As sysfs has it: 0000:01:00.0."""
    iommu: Literal["on", "off"] | None = None

    @property
    def sysfs(self) -> str:
        return f"/sys/bus/pci/devices/{self.address}"


@dataclass(frozen=True)
class VmShape:
    """The part of a VM's configuration that a driver reads."""

    name: str
    memory_mib: int
    cpus: int
    kernel_params: tuple[str, ...] = ()
    needs_pci: bool = False
    """The VM has a device that only a PCI machine can hold."""
    memory_max_mib: int | None = None
    """What the memory can grow to while the VM runs; None: not at all."""
    vhost_user: tuple[VhostUserDevice, ...] = ()
    pci: tuple[PciFunction, ...] = ()
    """Bound to vfio-pci, their groups' nodes in /dev/vfio open to the VM's uid."""
    usb: bool = False
    """The VM has an xHCI controller, into which host devices can be plugged while it runs."""
    ifnames: tuple[tuple[str, str], ...] = ()
    """Of each network interface the guest's name for it and its MAC, lower case with colons."""
    crosvm: CrosvmShape = field(default_factory=CrosvmShape)
    qemu: QemuShape = field(default_factory=QemuShape)
    cloud_hypervisor: CloudHypervisorShape = field(default_factory=CloudHypervisorShape)


@dataclass(frozen=True)
class KernelVsock:
    cid: int
    device_fd: int
    """Open /dev/vhost-vsock; holding it is what reserves the CID once the VMM has set it."""


@dataclass(frozen=True)
class HybridVsock:
    cid: int
    vhost_socket: str
    """Path on which vhost-device-vsock listens; it must do so before the VMM starts."""


@dataclass(frozen=True)
class BuiltinVsock:
    """The VMM's own hybrid vsock: it listens on `socket_path` itself."""

    cid: int
    socket_path: str


@dataclass(frozen=True)
class Disk:
    """A disk of raw bytes, by descriptor: O_RDONLY exactly where `readonly`, else O_RDWR (QEMU compares)."""

    fd: int
    readonly: bool
    pmem: bool = False
    """It is to be persistent memory: its size is right for that, and the initrd has the driver."""
    size: int = 0
    """Bytes; known where it is persistent memory."""


@dataclass(frozen=True)
class DiskDevice:
    """A disk beside the root, by descriptor, opened as Disk's. The guest finds it by `serial`. `lock`: the
    VMM may lock it too. Its content has been checked to be of `format`.
    """

    fd: int
    serial: str
    readonly: bool = False
    format: Literal["raw", "qcow2"] = "raw"
    sparse: bool = True
    direct: bool = False
    lock: bool = True
    block_size: int = 512


@dataclass(frozen=True)
class NetDevice:
    """A network interface: the open queues of one TAP or macvtap. The VMM gets no right to open another."""

    name: str
    """The guest's name for it, by which it is taken away again."""
    mac: str
    """The guest's."""
    tap_fds: tuple[int, ...]
    """One for each pair of queues, at least one, none but these attached to the device."""
    vhost_fds: tuple[int, ...] = ()
    """Open /dev/vhost-net, one for each of tap_fds; or none: the VMM itself carries every packet."""

    @property
    def id(self) -> str:
        """What the VMM calls it, where it has names for its devices."""
        return f"net-{self.name}"

    @property
    def fds(self) -> tuple[int, ...]:
        return (*self.tap_fds, *self.vhost_fds)


@dataclass(frozen=True)
class ShareDevice:
    """A shared directory: the guest's name for it, and the way to its virtiofsd."""

    tag: str
    fd: int
    """As one of vhost_user_fds."""


@dataclass(frozen=True)
class Leases:
    """What the VM holds while it runs. The guest's secret is not here: it is inside the initrd's memfd.

    QEMU opens kernel and initrd again through /proc/self/fd, so both must be readable to the VM's uid (0444
    will do).
    """

    name: str
    uid: int
    gid: int
    owner: int
    vsock: KernelVsock | HybridVsock | BuiltinVsock
    monitor_fd: int
    """Listening: SOCK_SEQPACKET for crosvm, SOCK_STREAM for the others."""
    kernel_fd: int
    initrd_fd: int | None
    kvm: bool
    empty_dir: str
    """An existing empty directory, the root of crosvm's device jails (Debian has no /var/empty)."""
    root: Disk | None
    """The first virtio disk: the read-only erofs image, or a writable raw one."""
    landlock: bool = False
    """The host's kernel can confine a process to the files that it names (cloud-hypervisor)."""
    vhost_user_fds: tuple[int, ...] = ()
    """One for each of VmShape.vhost_user: connected for crosvm and QEMU; for cloud-hypervisor, which
    connects itself, O_PATH of the socket."""
    nets: tuple[NetDevice, ...] = ()
    """In the order of the configuration."""
    shares: tuple[ShareDevice, ...] = ()
    disks: tuple[DiskDevice, ...] = ()
    """Behind the root."""


@dataclass(frozen=True)
class Launch:
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    fds: tuple[int, ...]
    """fds[i] must be number FD_BASE + i in the VMM, not close-on-exec; it gets no other but 0, 1 and 2."""
    own_terminal: bool = False
    """Its standard input must be the controlling terminal of its session."""


class PassedFds:
    """Hands out the numbers that descriptors will have in the VMM; lives while one Launch is planned."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def number(self, fd: int) -> int:
        if fd < 0:
            raise LaunchRefused(f"a descriptor for the VMM is not open ({fd})")
        if fd not in self._fds:
            self._fds.append(fd)
        return FD_BASE + self._fds.index(fd)

    def path(self, fd: int) -> str:
        return f"/proc/self/fd/{self.number(fd)}"

    def passed(self) -> tuple[int, ...]:
        return tuple(self._fds)
