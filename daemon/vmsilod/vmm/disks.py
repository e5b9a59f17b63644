"""The disks beside the root, in the words of each VMM. Pure; called by the drivers' plan_launch.

A guest finds each by its serial number. Formats are told and never probed where the VMM can be told (crosvm
cannot: vmsilod.resources.disk_format looks before every start).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vmsilod.vmm.errors import BadOptionValue, LaunchRefused

if TYPE_CHECKING:
    from vmsilod.vmm.launch import DiskDevice, Leases, PassedFds

OVERLAY_SERIAL = "vmsilo-overlay"
CRYPT_SERIAL = "vmsilo-crypt"  # an overlay that the guest formats behind a key of its own
_SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,19}")


def disk_id(serial: str) -> str:
    """The VMM's name for a disk, by which it grows."""
    return f"disk-{serial}"


def plan_crosvm(leases: Leases, fds: PassedFds) -> list[str]:
    args = []
    for disk in leases.disks:
        words = [f"path={fds.path(disk.fd)}", f"ro={_word(disk.readonly)}", f"id={_check_serial(disk)}"]
        words += [f"lock={_word(disk.lock)}", f"sparse={_word(disk.sparse)}"]
        words += ["direct=true"] if disk.direct else []
        words += [f"block-size={disk.block_size}"] if disk.block_size != 512 else []
        args += ["--block", ",".join(words)]
    return args


def plan_qemu(leases: Leases, fds: PassedFds, bus: str) -> list[str]:
    args = []
    for disk in leases.disks:
        number, name = fds.number(disk.fd), disk_id(_check_serial(disk))
        protocol = [f"file.driver=file,file.filename=/dev/fdset/{number}"]
        protocol += ["file.locking=off"] if not disk.lock else []
        layer = [f"driver={disk.format},node-name={name}"]
        layer.append("read-only=on" if disk.readonly else "read-only=off")
        layer.append("discard=unmap" if disk.sparse and not disk.readonly else "discard=ignore")
        # It takes only a descriptor that has O_DIRECT already.
        protocol += ["cache.direct=on,file.cache.direct=on"] if disk.direct else []
        device = [f"virtio-blk-{bus},drive={name},id={name}-dev,serial={disk.serial}"]
        if disk.block_size != 512:
            device.append(f"logical_block_size={disk.block_size},physical_block_size={disk.block_size}")
        # The default for a full file system is a VM that stands still until somebody tells it to go on.
        device.append("werror=report,rerror=report")
        args += ["-add-fd", f"fd={number},set={number}", "-blockdev", ",".join([*layer, *protocol])]
        args += ["-device", ",".join(device)]
    return args


def plan_cloud_hypervisor(leases: Leases, fds: PassedFds) -> list[str]:
    """What follows the root's --disk; all disks are values of one option."""
    values = []
    for disk in leases.disks:
        if disk.block_size != 512:
            raise LaunchRefused(
                f"disk '{disk.serial}' of {leases.name} has a block_size, and cloud-hypervisor knows none",
                'set vmm to "crosvm" or "qemu"',
            )
        words = [f"path={fds.path(disk.fd)}", f"readonly={_switch(disk.readonly)}"]
        words += [f"image_type={disk.format},backing_files=off", f"id={disk_id(_check_serial(disk))}"]
        words += [f"serial={disk.serial}", f"sparse={_switch(disk.sparse and not disk.readonly)}"]
        words += ["direct=on"] if disk.direct else []
        values.append(",".join(words))
    return values


def _word(value: bool) -> str:  # noqa: FBT001 - a value in another language, not an option
    return "true" if value else "false"


def _switch(value: bool) -> str:  # noqa: FBT001 - as above
    return "on" if value else "off"


def _check_serial(disk: DiskDevice) -> str:
    if not _SERIAL.fullmatch(disk.serial):
        raise BadOptionValue(f"{disk.serial!r} is not the serial number of a disk")
    return disk.serial
