"""A VM's configuration in the words of its disks: what is to be opened, what the guest is told, what the
driver gets. Pure.

Called by shapes and runs at a VM's start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsilod.config.disks import parse_size, persist_name
from vmsilod.resources.disks import DiskRequest
from vmsilod.resources.shares import escape_path, mount_unit
from vmsilod.vmm.launch import DiskDevice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsilod.config.disks import AdditionalDisk
    from vmsilod.config.model import VmConfig
    from vmsilod.resources.disks import OpenDisk

PERSIST_LIST = "init/persist"
"""For the guest's init, and not kept after it: lines of NAME PATH, parents before their children."""


def plan_request(config: VmConfig) -> DiskRequest:
    own_boot = config.kernel is not None or config.initramfs is not None
    overlay = config.root_overlay.on_disk and config.root_disk_readonly and not own_boot
    return DiskRequest(
        overlay_size=parse_size(config.root_overlay.size) if overlay else None,
        persist_size=parse_size(config.persist_size) if config.persist else None,
        additional=config.additional_disks,
    )


def plan_devices(disks: Sequence[OpenDisk]) -> tuple[DiskDevice, ...]:
    return tuple(
        DiskDevice(
            fd=disk.fd,
            serial=disk.serial,
            readonly=disk.readonly,
            format=disk.format,
            sparse=disk.sparse,
            direct=disk.direct,
            lock=disk.lock,
            block_size=disk.block_size,
        )
        for disk in disks
    )


def plan_guest_files(config: VmConfig) -> dict[str, str]:
    """Path below /run/systemd -> text: a mount unit for each disk that has a place, and the kept paths."""
    files: dict[str, str] = {}
    mounts = [disk for disk in config.additional_disks if disk.mount is not None]
    for disk in mounts:
        files[f"system/{mount_unit(disk.mount or '')}"] = _render_mount(disk)
    if mounts:
        names = " ".join(mount_unit(disk.mount or "") for disk in mounts)
        # Wants, not Requires: a disk that holds nothing yet keeps no guest from its boot.
        files["system/local-fs.target.d/50-vmsilo-disks.conf"] = f"[Unit]\nWants={names}\n"
    if config.persist:
        lines = "".join(f"{persist_name(path)} {path}\n" for path in sorted(config.persist))
        files[PERSIST_LIST] = lines
        grow = next(iter(sorted(config.persist)))
        files["system/multi-user.target.d/50-vmsilo-persist.conf"] = (
            f"[Unit]\nWants=systemd-growfs@{escape_path(grow)}.service\n"
        )
    return files


def _render_mount(disk: AdditionalDisk) -> str:
    place = disk.mount or ""
    words = ["ro" if disk.ro else "rw", "nodev", "nosuid"]
    words += ["discard"] if disk.sparse and not disk.ro else []
    grow = "" if disk.ro else f"Wants=systemd-growfs@{escape_path(place)}.service\n"
    return (
        f"[Unit]\nDescription=Disk {disk.id}\nBefore=local-fs.target\n{grow}\n"
        f"[Mount]\nWhat=/dev/disk/by-id/virtio-{disk.id}\nWhere={place}\nOptions={','.join(words)}\n"
    )
