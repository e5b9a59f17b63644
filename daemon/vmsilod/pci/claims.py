"""The PCI devices of this host, for the rest of vmsilod: one thing at a time, in the worker.

Made by main; called by runs (start, end, repair), by publication (isolation) and by the lifecycle for the
bus. It runs on the GLib loop and never blocks it. The books are the ledger's.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from vmsilod import loop
from vmsilod.errors import BadRequest, VmsiloError
from vmsilod.pci.address import parse_address
from vmsilod.pci.ledger import Ledger, PciView
from vmsilod.pci.plan import Refused, Wanted
from vmsilod.pci.roots import Roots
from vmsilod.pci.state import STATE_FILE
from vmsilod.pci.topology import VFIO_DRIVER
from vmsilod.waiting import Lock

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from pathlib import Path

log = logging.getLogger(__name__)

DRIVER_UNIT = "modprobe@vfio_pci.service"


class PciClaims:
    """`start_unit` starts a unit of systemd's and returns the job's result: vmsilod may load no module."""

    def __init__(
        self,
        start_unit: Callable[[str], Awaitable[str]],
        roots: Roots | None = None,
        file: Path = STATE_FILE,
    ) -> None:
        self._start_unit = start_unit
        self._roots = roots or Roots()
        self._ledger = Ledger(self._roots, file)
        self._isolated: tuple[str, ...] = ()
        self._lock = Lock()

    async def start(self, vm: str, uid: int, addresses: Sequence[str]) -> None:
        """All that the VMM needs to open these devices; `end` takes it back. Refused changes nothing."""
        if not addresses:
            return
        async with self._lock:
            wanted = Wanted(vm, uid, tuple(addresses))
            if not self._has_driver():
                # What speaks against this start is told before a module that is missing.
                await loop.in_worker(self._ledger.check_start, wanted)
                await self._load_driver()
            await loop.in_worker(self._ledger.start, wanted)

    async def end(self, vm: str) -> None:
        """Never fails: what cannot be taken back counts as used until the next vmsilod tries again. A VM
        without devices waits for nobody's.
        """
        if not self._ledger.holds(vm):
            return
        async with self._lock:
            try:
                await loop.in_worker(self._ledger.end, vm)
            except VmsiloError as error:
                log.error("VM %s: %s", vm, error)

    async def isolate(self, addresses: Iterable[str]) -> None:
        """Take over the configuration's list, and claim what a driver of the host still has."""
        self._isolated = tuple(addresses)
        if not self._isolated:
            return
        async with self._lock:
            try:
                await self._load_driver()
            except VmsiloError as error:
                log.warning("no device is isolated: %s", error)
                return
            await loop.in_worker(self._ledger.isolate, self._isolated)

    async def repair(self, running: Iterable[str]) -> None:
        """Never fails, so that vmsilod starts."""
        async with self._lock:
            try:
                await loop.in_worker(self._ledger.repair, tuple(running))
            except VmsiloError as error:
                log.error("the PCI devices of ended VMs are not all taken back: %s", error)

    async def find_views(self) -> list[PciView]:
        async with self._lock:
            return await loop.in_worker(self._ledger.find_views, self._isolated)

    async def claim(self, text: str) -> None:
        address = _parse(text)
        async with self._lock:
            if not self._has_driver():
                await loop.in_worker(self._ledger.check_claim, address)
                await self._load_driver()
            await loop.in_worker(self._ledger.claim, address)

    async def give_back(self, text: str) -> str:
        """The driver that has it now."""
        address = _parse(text)
        async with self._lock:
            isolated = address in self._isolated
            return await loop.in_worker(partial(self._ledger.give_back, address, isolated=isolated))

    def _has_driver(self) -> bool:
        return self._roots.driver(VFIO_DRIVER).is_dir()

    async def _load_driver(self) -> None:
        if self._has_driver():
            return
        try:
            await self._start_unit(DRIVER_UNIT)
        except VmsiloError as error:
            raise Refused(f"the driver {VFIO_DRIVER} cannot be loaded: {error.message}") from error
        if not self._has_driver():
            raise Refused(f"this kernel has no driver {VFIO_DRIVER}", "install the kernel's module vfio-pci")


def _parse(text: str) -> str:
    try:
        return parse_address(text)
    except ValueError as error:
        raise BadRequest(str(error)) from error
