"""One start in the words of others: what preparation is to acquire (Request); for the driver, the VM's
configuration as a VmShape and what was acquired as Leases.

Called by the runs. Pure but for uids and groups, which are looked up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsilod.disk_plans import plan_devices, plan_request
from vmsilod.errors import StartFailed
from vmsilod.host import LIBDIR, find_uid
from vmsilod.network.guest import plan_ifnames
from vmsilod.preparation import Request
from vmsilod.resources.image import BootChoice
from vmsilod.resources.vhost_user import Account, find_groups
from vmsilod.vmm import launch
from vmsilod.vmm.choose import VmmKind
from vmsilod.vmm.drivers import DRIVERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsilod.config.model import VmConfig
    from vmsilod.control import Peer
    from vmsilod.host import Host
    from vmsilod.network.plan import Port
    from vmsilod.preparation import Acquired

EMPTY_DIR = LIBDIR / "empty"  # crosvm's pivot root: Debian has no /var/empty


def shape_of(config: VmConfig, ports: Sequence[Port] = ()) -> launch.VmShape:
    vhost_user = tuple(
        launch.VhostUserDevice(device.type, device.socket, tuple(device.options.items()))
        for device in config.vhost_user
    )
    return launch.VmShape(
        name=config.name,
        memory_mib=config.memory,
        cpus=config.cpus,
        kernel_params=(*config.kernel_params, *_ids_of(config)),
        needs_pci=config.memory_max is not None or bool(vhost_user) or bool(config.pci_devices),
        pci=tuple(launch.PciFunction(device.path, device.iommu) for device in config.pci_devices),
        usb=config.wants_usb,
        ifnames=plan_ifnames(ports),
        memory_max_mib=config.memory_max,
        vhost_user=vhost_user,
        crosvm=launch.CrosvmShape(
            config.crosvm.log_level, tuple(config.crosvm.extra_args), tuple(config.crosvm.extra_run_args)
        ),
        qemu=launch.QemuShape(tuple(config.qemu.extra_args), config.qemu.accel, config.qemu.machine),
        cloud_hypervisor=launch.CloudHypervisorShape(
            config.cloud_hypervisor.log_level, tuple(config.cloud_hypervisor.extra_args)
        ),
    )


def _ids_of(config: VmConfig) -> tuple[str, ...]:
    return () if config.guest_id is None else (f"vmsilo.ids={config.guest_id}:{config.guest_id}",)


def request_of(config: VmConfig, peer: Peer, kind: VmmKind, host: Host) -> Request:
    """What is to be acquired for a start of this VM by this launcher; guest_files are added later."""
    driver = DRIVERS[kind]
    return Request(
        name=config.name,
        uid=peer.uid,
        gid=peer.gid,
        relay_gid=host.relay_gid,
        hybrid=host.hybrid and not driver.builtin_vsock,
        boot=BootChoice(config.image, config.kernel, config.initramfs, config.root_disk_path),
        root_readonly=config.root_disk_readonly,
        monitor_kind=driver.monitor_type,
        builtin_vsock=driver.builtin_vsock,
        opens_as=Account(peer.uid, find_groups(peer.pid, peer.gid)) if driver.opens_by_path else None,
        vhost_user=tuple(device.socket for device in config.vhost_user),
        ssh=config.ssh,
        owner=find_uid(config.user),
        disks=plan_request(config),
    )


def leases_of(config: VmConfig, peer: Peer, acquired: Acquired, kind: VmmKind, host: Host) -> launch.Leases:
    return launch.Leases(
        name=config.name,
        uid=peer.uid,
        gid=peer.gid,
        owner=find_uid(config.user),
        vsock=_channel_of(acquired, builtin=DRIVERS[kind].builtin_vsock),
        monitor_fd=acquired.monitor_fd,
        kernel_fd=acquired.kernel_fd,
        initrd_fd=acquired.initrd_fd,
        kvm=host.kvm.usable,
        landlock=host.landlock,
        empty_dir=str(EMPTY_DIR),
        root=launch.Disk(
            acquired.root_fd,
            config.root_disk_readonly,
            pmem=is_root_pmem(config, acquired, kind),
            size=acquired.root_size,
        ),
        vhost_user_fds=tuple(acquired.vhost_user_fds),
        disks=plan_devices(acquired.disks),
    )


def is_root_pmem(config: VmConfig, acquired: Acquired, kind: VmmKind) -> bool:
    """What image.device asks for; "auto": where it costs nothing, or saves the guest a copy of its own."""
    wanted, driver = config.image_options.device, DRIVERS[kind]
    pci = kind is not VmmKind.QEMU or config.qemu.machine != "microvm"
    possible = acquired.root_pmem and pci and (driver.pmem_huge if acquired.root_huge else driver.pmem)
    if wanted == "pmem" and not possible:
        raise StartFailed(
            f"the root of VM '{config.name}' cannot be persistent memory under {kind.value}"
            + ("" if acquired.root_pmem else ": its image is too old for that, or not the image's own"),
            'set image.device to "auto"',
        )
    if wanted == "auto":
        return possible and (driver.pmem_root or acquired.root_huge)
    return wanted == "pmem"


def _channel_of(
    acquired: Acquired, *, builtin: bool
) -> launch.KernelVsock | launch.HybridVsock | launch.BuiltinVsock:
    if acquired.device_fd is not None:
        return launch.KernelVsock(acquired.cid, acquired.device_fd)
    folder = acquired.rundir / "vsock"
    if builtin:
        return launch.BuiltinVsock(acquired.cid, str(folder / "vsock"))
    return launch.HybridVsock(acquired.cid, str(folder / "vhost"))
