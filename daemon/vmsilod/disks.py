"""The disks of all VMs as people see them: listed, grown, and the disk of kept paths removed.

`bus.views.DiskDomain`, built by the lifecycle, called by the bus under polkit's word. It keeps no state:
files, records and the VMs' configurations say everything. It only ever makes a disk larger, and reads no
byte that a guest wrote but the first of a disk that no VM runs with.
"""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmsilod import loop
from vmsilod.bus.requests import RunRequest
from vmsilod.bus.views import DiskView
from vmsilod.config.disks import PERSIST_ID, PERSIST_SERIAL
from vmsilod.disk_claims import find_holder, find_holders
from vmsilod.disk_plans import plan_request
from vmsilod.errors import BadRequest, Busy, Failed, NotRunning, VmsiloError
from vmsilod.resources import disk_keys, disks, filesystems, image, rundir
from vmsilod.resources.disk_format import check_format
from vmsilod.spawning import send_frame, spawn_frame
from vmsilod.vmm import drivers
from vmsilod.vmm.choose import VmmKind
from vmsilod.vmm.monitor import DiskPlace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vmsilod.config.model import VmConfig
    from vmsilod.registry import Registry, Vm
    from vmsilod.relay_client import RelayClient
    from vmsilod.resources.disk_format import Format

log = logging.getLogger(__name__)

MONITOR_SECONDS = 15.0
TOLD_SECONDS = 1.0
"""What the guest's agent gets to do what it is told. It is not asked whether it did."""
ALIGNMENT = 4096  # bytes; the largest block size

# What is mounted of the disk grows as far as the disk goes: ext4, btrfs and xfs can while they are in use.
GROW = r"""
device=$(readlink -e "/dev/disk/by-id/virtio-$1") || exit
udevadm settle --timeout=5
while read -r source place rest; do
    [ "$source" != "$device" ] || exec /usr/lib/systemd/systemd-growfs "$(printf %b "$place")"
done </proc/self/mounts
"""


@dataclass(frozen=True)
class Target:
    """A disk with a file, as a configuration has it."""

    id: str
    serial: str
    path: Path
    readonly: bool = False
    format: Format = "raw"
    mount: str = ""
    created: bool = False
    """It is made where it is missing, at the VM's next start."""


class Disks:
    """All of them; lives as long as the lifecycle."""

    def __init__(self, registry: Registry, relay: Callable[[], RelayClient]) -> None:
        self._registry = registry
        self._relay = relay

    async def list_disks(self, name: str) -> list[DiskView]:
        """Of the VM `name`, or of all and of none for ""."""
        vms = [self._registry.require(name)] if name else list(self._registry)
        views = []
        holders = find_holders(self._registry)
        for vm in vms:
            config = _config_of(vm)
            if config is None:
                continue
            size = plan_request(config).overlay_size
            if size is not None:
                state = "in use" if vm.is_up else "ephemeral"
                views.append(DiskView(vm.name, "overlay", "", state, size=size, format="raw"))
            for target in find_targets(vm.name, config):
                views.append(await loop.in_patient_worker(_view, vm.name, target, holders))
        if not name:
            views += await loop.in_worker(_find_left_behind, {vm.name for vm in self._registry})
        return views

    async def grow(self, name: str, disk: str, size: int) -> None:
        """To `size` bytes, whether or not the VM runs; returns when the disk has them."""
        vm = self._registry.require(name)
        if size <= 0 or size % ALIGNMENT:
            raise BadRequest(f"{size} bytes are not a multiple of {ALIGNMENT}")
        async with vm.lock:
            config = _config_of(vm)
            targets = find_targets(name, config) if config is not None else []
            target = next((each for each in targets if each.id == disk), None)
            if target is None:
                raise BadRequest(f"VM '{name}' has no disk '{disk[:64]}'", f"vmsilo disk list {name}")
            if vm.record is not None:
                await self._grow_running(vm, target, size)
            else:
                await self._grow_stopped(target, size)
        log.info("VM %s: disk %s has %d bytes now", name, disk, size)

    async def remove(self, name: str, disk: str) -> None:
        """Only the disk of kept paths is vmsilo's to remove; its VM may be configured no more."""
        if disk != PERSIST_ID:
            raise BadRequest(
                f"'{disk[:64]}' is not a disk that vmsilo keeps: only '{PERSIST_ID}' is",
                "a disk of additional_disks is a file of yours: remove it as one",
            )
        vm = self._registry.find(name)
        if vm is None:
            await loop.in_worker(_remove_persist, name)
            return
        async with vm.lock:
            if vm.is_up or vm.record is not None:
                raise Busy(f"VM '{name}' runs with it", f"vm-stop {name}")
            await loop.in_worker(_remove_persist, name)

    async def _grow_running(self, vm: Vm, target: Target, size: int) -> None:
        record = vm.record
        assert record is not None
        if vm.unit.active != "active" or not record.launched:
            raise NotRunning(f"VM '{vm.name}' is on its way up or down", "try again")
        if target.readonly:
            raise BadRequest(
                f"VM '{vm.name}' has disk '{target.id}' read-only", "grow it where it is written"
            )
        key, before = await loop.in_patient_worker(_inspect, target)
        keys = list(record.disks)
        if key not in keys:
            raise BadRequest(
                f"{target.path} is not the file that VM '{vm.name}' runs with",
                f"vm-stop {vm.name}, then again",
            )
        _require_growth(target, before, size)
        monitor = drivers.DRIVERS[VmmKind(record.vmm)].open_monitor(
            rundir.VM_DIR / vm.name / "monitor.sock", timeout=MONITOR_SECONDS
        )
        place = DiskPlace(target.serial, keys.index(key) - record.root_pmem)
        await loop.in_worker(monitor.resize_disk, place, size)
        if target.format == "raw":
            _, after = await loop.in_patient_worker(_inspect, target)
            if after < size:
                raise Failed(f"the VMM said that it had grown {target.path}, which has {after} bytes")
        await self._tell_guest(vm, target)

    async def _grow_stopped(self, target: Target, size: int) -> None:
        holder = find_holder(
            (await loop.in_patient_worker(_inspect, target))[0], find_holders(self._registry)
        )
        if holder:
            raise Busy(f"VM '{holder}' runs with {target.path}", f"vm-stop {holder}")
        await loop.in_patient_worker(_grow_file, target, size)

    async def _tell_guest(self, vm: Vm, target: Target) -> None:
        """One that does not listen grows its file system at its next start, or by hand."""
        if not vm.ready:
            return
        argv = ("sh", "-c", GROW, "sh", target.serial)
        try:
            frame = spawn_frame(RunRequest(vm.name, 0, argv, root=True, detach=True))
            fd = await self._relay().connect(vm.name, "root")
            try:
                await loop.in_worker(send_frame, fd, frame)
                await loop.after(TOLD_SECONDS)
            finally:
                os.close(fd)
        except VmsiloError as error:
            log.info("VM %s: its guest is not told that disk %s grew (%s)", vm.name, target.id, error)


def find_targets(name: str, config: VmConfig) -> list[Target]:
    """The disks of this configuration that have files, in its order. Pure."""
    targets = []
    if config.persist:
        path = disks.find_persist(name)
        targets.append(Target(PERSIST_ID, PERSIST_SERIAL, path, created=True))
    targets += [
        Target(
            id=disk.id or "",
            serial=disk.id or "",
            path=Path(disk.path),
            readonly=disk.ro,
            format=disk.format,
            mount=disk.mount or "",
            created=disk.create is not None,
        )
        for disk in config.additional_disks
    ]
    return targets


def _config_of(vm: Vm) -> VmConfig | None:
    return vm.started if vm.record is not None else vm.config


def _inspect(target: Target) -> tuple[str, int]:
    """Key and size of the file, which is there."""
    fd = image.open_file(target.path)
    try:
        if stat.S_ISBLK(os.fstat(fd).st_mode):
            raise BadRequest(
                f"{target.path} is a block device, which vmsilo does not grow",
                "grow it with its own tools, then restart the VM",
            )
        return disk_keys.key_of(fd), os.fstat(fd).st_size
    finally:
        os.close(fd)


def _require_growth(target: Target, before: int, size: int) -> None:
    """The file of a qcow2 says nothing of the disk's size: there the VMM refuses to shrink, if it must."""
    if target.format == "raw" and size <= before:
        raise BadRequest(
            f"disk '{target.id}' has {before} bytes already",
            "a disk is never made smaller: what is in it would be lost",
        )


def _grow_file(target: Target, size: int) -> None:
    if target.format != "raw":
        raise BadRequest(f"{target.path} is a qcow2 image", "it grows while its VM runs: start it before")
    fd = image.open_file(target.path, writable=True)
    try:
        disks.lock_file(fd, str(target.path), writable=True)
        check_format(fd, "raw", str(target.path))
        _require_growth(target, os.fstat(fd).st_size, size)
        filesystems.enlarge(fd, size, str(target.path))
    finally:
        os.close(fd)


def _remove_persist(name: str) -> None:
    path = disks.find_persist(name)
    try:
        path.unlink()
    except FileNotFoundError as error:
        raise BadRequest(f"VM '{name}' has no disk of kept paths", "vmsilo disk list") from error
    except OSError as error:
        raise Failed(f"cannot remove {path}: {error.strerror}") from error
    log.info("VM %s: its disk of kept paths is removed", name)


def _view(name: str, target: Target, holders: Mapping[str, Mapping[str, bool]]) -> DiskView:
    try:
        status = target.path.stat()
    except FileNotFoundError:
        state, key, size, allocated = "not created" if target.created else "missing", "", 0, 0
    except OSError as error:
        state, key, size, allocated = f"broken: {error.strerror}", "", 0, 0
    else:
        key, size, allocated = disk_keys.key_of_status(status), status.st_size, status.st_blocks * 512
        state = "in use" if key in holders.get(name, {}) else "idle"
        other = find_holder(key, {vm: held for vm, held in holders.items() if vm != name})
        state = f"in use by {other}" if state == "idle" and other else state
    return DiskView(
        vm=name,
        id=target.id,
        path=str(target.path),
        state=state,
        size=size,
        allocated=allocated,
        format=target.format,
        readonly=target.readonly,
        mount=target.mount,
    )


def _find_left_behind(known: set[str]) -> list[DiskView]:
    """Disks of kept paths whose VMs are configured no more."""
    targets = {
        path.stem: Target(PERSIST_ID, PERSIST_SERIAL, path) for path in disks.PERSIST_DIR.glob("*.img")
    }
    return [
        replace(_view(name, target, {}), state="left behind")
        for name, target in sorted(targets.items())
        if name not in known
    ]
