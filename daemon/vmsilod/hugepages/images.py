"""Who uses which image in huge pages: leases for VMs that start, copies made on first use, dropped when the
last user has stopped.

Called by the runs, on the GLib loop; all work is the store's, in the worker and under one lock. It keeps no
truth of its own: users are the VMs whose lease record names the image, so that a vmsilod that was killed
goes on where its predecessor was. A VM's record names the image before the image is looked for.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from typing import TYPE_CHECKING

from vmsilod import loop
from vmsilod.config.model import VmConfig
from vmsilod.errors import VmsiloError
from vmsilod.hugepages.copying import Source
from vmsilod.hugepages.errors import NoHugepages
from vmsilod.hugepages.store import Store
from vmsilod.resources import image
from vmsilod.resources.record import Record, save_record
from vmsilod.waiting import Lock

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from vmsilod.preparation import Request
    from vmsilod.registry import Registry, Vm

log = logging.getLogger(__name__)

MOUNT_UNIT = "run-vmsilo-hugepages.mount"
SHOW_SECONDS = 0.2  # between two texts about the progress
WAITING = "waiting for its image in huge pages"


class HugepageImages:
    """`start_unit` starts a unit and returns systemd's result; `on_change` tells of a VM's new status."""

    def __init__(
        self,
        registry: Registry,
        start_unit: Callable[[str], Awaitable[str]],
        on_change: Callable[[Vm], None],
        store: Store | None = None,
    ) -> None:
        self._registry = registry
        self._start_unit = start_unit
        self._on_change = on_change
        self._store = store or Store()
        self._lock = Lock()
        self._repaired = False

    async def lease(self, vm: Vm, config: VmConfig, request: Request) -> Request:
        """The request, with the image's root in huge pages if the configuration asks for that: the
        descriptor is the caller's to close.
        """
        options = config.image_options
        if not options.hugepages or config.root_disk is not None or not config.root_disk_readonly:
            return request
        source = await loop.in_worker(find_source, request.boot)
        await _remember(vm, f"{source.image}/{source.version}")
        self._show(vm, WAITING)
        try:
            async with self._lock:
                fd = await self._open(source)
        except NoHugepages as error:
            if options.short_of_pages == "refuse":
                raise
            log.warning("VM %s: %s; its image is read through the page cache", vm.name, error.message)
            await _remember(vm, "")
            return request
        finally:
            self._show(vm, "")
        return dataclasses.replace(request, huge_root=fd)

    async def _open(self, source: Source) -> int:
        await self._mount()
        fd = await loop.in_worker(self._store.find, source.image, source.version)
        if fd is not None:
            return fd
        shown = 0.0

        def report(part: float) -> None:  # in the worker
            nonlocal shown
            if time.monotonic() - shown >= SHOW_SECONDS:
                shown = time.monotonic()
                text = f"copying image {source.image} into huge pages: {part:.0%}"
                loop.call_soon(self._show_all, source, text)

        return await loop.in_patient_worker(self._store.add, source, report)

    async def _mount(self) -> None:
        if await loop.in_worker(self._store.is_mounted):
            return
        result = await self._start_unit(MOUNT_UNIT)
        if not await loop.in_worker(self._store.is_mounted):
            raise NoHugepages(
                f"vmsilo's hugetlbfs cannot be mounted: systemd says '{result}'",
                f"systemctl status {MOUNT_UNIT}",
            )

    def _show_all(self, source: Source, text: str) -> None:
        """To everybody who waits for it."""
        for vm in self._users(source.image, source.version):
            if vm.status.startswith((WAITING, "copying image ")):
                self._show(vm, text)

    def _show(self, vm: Vm, text: str) -> None:
        if vm.status != text:
            vm.status = text
            self._on_change(vm)

    def _users(self, name: str, version: str) -> list[Vm]:
        return [vm for vm in self._registry if vm.record and vm.record.hugepages == f"{name}/{version}"]

    async def release(self, record: Record) -> None:
        """Its run is over, and its record gone."""
        name, _, version = record.hugepages.partition("/")
        if not version or not self._repaired:  # not all users are known yet; repair() sees to it
            return
        seconds = _find_keep(record)
        if seconds and await loop.in_worker(_is_current, name, version):
            loop.call_later(seconds, lambda: loop.spawn(self._drop_unused(name, version)))
        else:
            await self._drop_unused(name, version)

    async def _drop_unused(self, name: str, version: str) -> None:
        async with self._lock:
            if self._users(name, version):
                return
            try:
                await loop.in_worker(self._store.drop, name, version)
            except VmsiloError as error:
                log.error("image %s/%s stays in huge pages: %s", name, version, error)

    async def repair(self) -> None:
        """At start, when the records of all running VMs have been read."""
        names = [vm.record.hugepages.partition("/") for vm in self._registry if vm.record is not None]
        used = {(name, version) for name, _, version in names if version}
        try:
            await loop.in_worker(self._store.repair, used)
        except VmsiloError as error:
            log.error("huge pages cannot be repaired: %s", error)
        self._repaired = True


async def _remember(vm: Vm, key: str) -> None:
    assert vm.record is not None
    vm.record = dataclasses.replace(vm.record, hugepages=key)
    await loop.in_worker(save_record, vm.record)


def find_source(boot: image.BootChoice, images: Path = image.IMAGES_DIR) -> Source:
    """Blocks."""
    files = image.find_boot_files(boot, images)
    manifest = json.loads((files.root.parent / "manifest.json").read_text())
    digests = manifest.get("sha256", {})
    return Source(boot.image, files.version, files.root, str(digests.get(files.root.name, "")))


def _find_keep(record: Record) -> int:
    try:
        return VmConfig.from_json(record.config).image_options.keep
    except ValueError:
        return 0  # of an older vmsilod


def _is_current(name: str, version: str) -> bool:
    try:
        return (image.IMAGES_DIR / name / "current").readlink().name == version
    except OSError:
        return False
