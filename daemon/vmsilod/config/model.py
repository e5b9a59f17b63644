"""The resolved configuration of one VM: its file, with the global file's values where that is silent.

Called by the loader (`resolve_vm`) and by the registry, which stores the configuration that a VM was
started with (`to_json`, `from_json`) and compares digests for "restart needed". Never reads a file.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from vmsilod.config.disks import DiskOptions
from vmsilod.config.image_options import ImageName, ImageOptions, resolve_image
from vmsilod.config.network import NetworkOptions
from vmsilod.config.schema import (
    AbsolutePath,
    AccountName,
    CloudHypervisorOptions,
    Color,
    CrosvmOptions,
    GlobalConfig,
    KernelParams,
    PciDevices,
    QemuOptions,
    RestartPolicy,
    RootDisk,
    Seconds,
    UsbDevices,
    VhostUserDevices,
    VmFile,
    VmmChoice,
    VmName,
    VmNames,
)
from vmsilod.config.shares import SharedDirectories, SharedHome

if TYPE_CHECKING:
    from collections.abc import Sequence

# Not part of what a running VM is made of: a change of these never asks for its restart.
_OUTSIDE_DIGEST = {"sources", "auto_start", "restart", "usb_devices", "image_options"}


class VmConfig(DiskOptions):
    """Everything that the files say about one VM; `vmm` may still be "auto", `sources` are those files.

    `template`: no file says this one; it is a disposable that was made of the VM of that name.
    `guest_id`: the uid and gid of its guest's user, None for those of the image; no file says that either.
    `shared_inode`: device and inode that its shared directory must have, None for what its path leads to;
    no file says that either.
    """

    name: VmName
    user: AccountName
    memory: int
    memory_max: int | None = None
    cpus: int
    color: Color
    image: ImageName
    image_options: ImageOptions = ImageOptions()
    kernel: AbsolutePath | None = None
    initramfs: AbsolutePath | None = None
    kernel_params: KernelParams = ()
    root_disk: RootDisk | None = None
    root_disk_readonly: bool = True
    ssh: bool = True
    vmm: VmmChoice = "auto"
    crosvm: CrosvmOptions = CrosvmOptions()
    qemu: QemuOptions = QemuOptions()
    usb: bool = False
    usb_devices: UsbDevices = ()
    cloud_hypervisor: CloudHypervisorOptions = CloudHypervisorOptions()
    vhost_user: VhostUserDevices = ()
    auto_start: bool = False
    disposable: bool = False
    template: VmName | None = None
    guest_id: int | None = None
    shared_inode: tuple[int, int] | None = None
    depends_on: VmNames = ()
    restart: RestartPolicy = RestartPolicy()
    pci_devices: PciDevices = ()
    network: NetworkOptions = NetworkOptions()
    shared_home: SharedHome = False
    shared_directories: SharedDirectories = ()
    start_timeout: Seconds
    stop_timeout: Seconds
    sources: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @property
    def root_disk_path(self) -> str | None:
        """The root disk of its own, None for the image's."""
        return self.root_disk.path if self.root_disk else None

    @property
    def wants_usb(self) -> bool:
        """Whether it gets a controller, which it can get only at its start."""
        return self.usb or bool(self.usb_devices)

    def digest(self) -> str:
        """SHA-256 (hex) over the canonical JSON of what makes up a running VM."""
        content = self.model_dump(mode="json", exclude=_OUTSIDE_DIGEST) | {
            "usb": self.wants_usb,
            "network": self.network.dump_for_guest(),
            "image_options": [self.image_options.hugepages, self.image_options.device],
        }
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> VmConfig:
        """The inverse of `to_json`; raises ValueError for anything else."""
        return cls.model_validate_json(text)


def resolve_vm(settings: GlobalConfig, vm: VmFile, sources: Sequence[str]) -> VmConfig:
    tables = {"crosvm", "qemu", "cloud_hypervisor", "root_disk", "vhost_user", "usb_devices", "network"}
    tables |= {"shared_directories", "image"}
    own = vm.model_dump(exclude=tables, exclude_none=True)
    if vm.disposable:
        own["shared_home"] = False
    inherited = {
        key: getattr(settings, key)
        for key in ("user", "vmm", "shared_home", "start_timeout", "stop_timeout")
        if key not in own
    }
    crosvm = CrosvmOptions(
        log_level=vm.crosvm.log_level or settings.crosvm.log_level,
        extra_args=settings.crosvm.extra_args + vm.crosvm.extra_args,
        extra_run_args=settings.crosvm.extra_run_args + vm.crosvm.extra_run_args,
    )
    qemu = QemuOptions(
        accel=vm.qemu.accel or settings.qemu.accel,
        machine=vm.qemu.machine or settings.qemu.machine,
        extra_args=settings.qemu.extra_args + vm.qemu.extra_args,
    )
    cloud_hypervisor = CloudHypervisorOptions(
        log_level=vm.cloud_hypervisor.log_level or settings.cloud_hypervisor.log_level,
        extra_args=settings.cloud_hypervisor.extra_args + vm.cloud_hypervisor.extra_args,
    )
    return VmConfig(
        **own,
        **inherited,
        **resolve_image(settings.image, vm.image),
        crosvm=crosvm,
        qemu=qemu,
        cloud_hypervisor=cloud_hypervisor,
        vhost_user=vm.vhost_user,
        root_disk=vm.root_disk,
        usb_devices=vm.usb_devices,
        network=vm.network,
        shared_directories=vm.shared_directories,
        sources=tuple(sources),
    )
