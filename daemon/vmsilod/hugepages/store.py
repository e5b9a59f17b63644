"""The hugetlbfs of vmsilo: which image versions are in it, and the pages that they hold.

    IMAGE=VERSION      a verified copy, mode 0444; never changed after it appeared
    .IMAGE=VERSION     one that is being made; whoever finds it later removes it

Used by HugepageImages only, one call at a time, in the worker. Every page that it takes is in the ledger
before it is taken; an image's file goes before its pages are given back. The directory is root's alone
(0700): VMs get read-only descriptors.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmsilod.errors import Failed
from vmsilod.hugepages import pool
from vmsilod.hugepages.copying import copy_verified, count_pages
from vmsilod.hugepages.errors import PAGE, NoHugepages, short_of_pages
from vmsilod.hugepages.ledger import LEDGER_FILE, Entry, Ledger
from vmsilod.resources.image import open_file

if TYPE_CHECKING:
    from collections.abc import Collection

    from vmsilod.hugepages.copying import Progress, Source

log = logging.getLogger(__name__)

MOUNT = Path("/run/vmsilo/hugepages")
PARTIAL = "."


@dataclass(frozen=True)
class StorePlace:
    """Where the store looks."""

    mount: Path = MOUNT
    ledger: Path = LEDGER_FILE
    sysfs: Path = pool.SYSFS
    mountinfo: Path = Path("/proc/self/mountinfo")


class Store:
    def __init__(self, place: StorePlace | None = None) -> None:
        place = place or StorePlace()
        self._mount = place.mount
        self._ledger = Ledger(place.ledger)
        self._sysfs = place.sysfs
        self._mountinfo = place.mountinfo

    def is_mounted(self) -> bool:
        for line in self._mountinfo.read_text().splitlines():
            before, _, after = line.partition(" - ")
            if before.split(" ")[4] == str(self._mount) and after.split(" ")[0] == "hugetlbfs":
                return True
        return False

    def find(self, image: str, version: str) -> int | None:
        """A descriptor for reading, which the caller owns."""
        try:
            return os.open(self._place(image, version), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Failed(f"cannot open {self._place(image, version)}: {error.strerror}") from error

    def add(self, source: Source, progress: Progress) -> int:
        """As `find`, after the image was copied and verified. NoHugepages: this host cannot; StartFailed:
        the image itself is at fault. Then nothing is taken.
        """
        began = time.monotonic()
        with ExitStack() as stack:
            source_fd = open_file(source.path)
            stack.callback(os.close, source_fd)
            pages = count_pages(os.fstat(source_fd).st_size)
            stack.callback(self._give_back, source.image, source.version)
            self._take(source, pages)
            place = self._place(source.image, source.version)
            partial = place.with_name(PARTIAL + place.name)
            stack.callback(partial.unlink, missing_ok=True)
            self._copy(source, source_fd, partial, progress)
            partial.rename(place)
            found = self.find(source.image, source.version)
            if found is None:
                raise Failed(f"{place} disappeared")
            stack.pop_all()
        os.close(source_fd)
        seconds = time.monotonic() - began
        log.info(
            "image %s/%s is in %d huge pages now (%.1f s)", source.image, source.version, pages, seconds
        )
        return found

    def drop(self, image: str, version: str) -> None:
        """The pages go back when no VMM maps them any more, which the kernel sees to."""
        self._place(image, version).unlink(missing_ok=True)
        self._give_back(image, version)
        log.info("image %s/%s is not in huge pages any more", image, version)

    def repair(self, used: Collection[tuple[str, str]]) -> None:
        """After a restart: keep the images in use (image and version), give back all others and whatever an
        unfinished change took.
        """
        entries = self._ledger.load()
        present = self._find_present()
        for key, entry in entries.items():
            if entry.phase == "held" and key in used and key in present:
                continue
            self._place(*key).unlink(missing_ok=True)
            self._give_back(*key)
        for key in present - entries.keys():
            if key not in used:
                self._place(*key).unlink(missing_ok=True)

    def _find_present(self) -> set[tuple[str, str]]:
        """The finished images; others are removed."""
        present = set()
        for path in self._mount.iterdir() if self.is_mounted() else ():
            image, _, version = path.name.partition("=")
            if path.name.startswith(PARTIAL) or not version:
                path.unlink()
            else:
                present.add((image, version))
        return present

    def _place(self, image: str, version: str) -> Path:
        return self._mount / f"{image}={version}"

    def _take(self, source: Source, pages: int) -> None:
        """Raise the pool by `pages`; where the kernel has not enough memory in pieces of that size, pages of
        the pool that nobody uses will have to do.
        """
        before = pool.read_counters(self._sysfs)
        room = pool.read_available_memory()
        if pages * PAGE > room + before.available * PAGE:  # without pressing the whole host for it
            more = f"the host has only {room >> 20} MiB of memory to make more of"
            raise short_of_pages(source.image, pages, before.available, more)
        # The kernel turns surplus pages, which are in use, into persistent ones before it makes any.
        asked = pages + before.surplus
        self._ledger.put(Entry(source.image, source.version, "growing", asked, before.persistent))
        pool.grow(before.persistent + asked, self._sysfs)
        after = pool.read_counters(self._sysfs)
        made = max(0, after.persistent - before.persistent)
        self._ledger.put(Entry(source.image, source.version, "held", min(made, asked)))
        if after.available < pages:
            more = f"the kernel could make {max(0, made - before.surplus)} more after compacting its memory"
            raise short_of_pages(source.image, pages, before.available, more)

    def _give_back(self, image: str, version: str) -> None:
        entry = self._ledger.load().get((image, version))
        if entry is None:
            return
        persistent = pool.read_counters(self._sysfs).persistent
        taken = entry.count_taken(persistent)
        self._ledger.put(Entry(image, version, "shrinking", taken, persistent))
        if taken:
            pool.set_persistent(persistent - taken, self._sysfs)
        self._ledger.remove(entry)

    def _copy(self, source: Source, source_fd: int, partial: Path, progress: Progress) -> None:
        try:
            target = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        except OSError as error:
            raise NoHugepages(f"cannot make a file in {self._mount}: {error.strerror}") from error
        try:
            os.ftruncate(target, count_pages(os.fstat(source_fd).st_size) * PAGE)
            copy_verified(source, source_fd, target, progress)
            # QEMU and cloud-hypervisor open their descriptor once more, as the VM's uid.
            os.fchmod(target, 0o444)
        finally:
            os.close(target)
