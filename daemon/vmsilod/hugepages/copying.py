"""Copies a file into hugetlbfs and verifies the copy. Pure work on descriptors; called by the store in the
worker.

hugetlbfs has no write(2): the copy is read straight into a shared mapping of the target. That mapping is
what reserves the pages, so a host that is short of them says so here, before anything is copied.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsilod.errors import StartFailed
from vmsilod.hugepages.errors import PAGE, NoHugepages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Progress = Callable[[float], None]

CHUNK = 8 << 20  # bytes; between two calls of the progress


@dataclass(frozen=True)
class Source:
    """The root of an image version. `digest` is its SHA-256 (hex) as the manifest has it, "" if it has
    none.
    """

    image: str
    version: str
    path: Path
    digest: str = ""


def count_pages(size: int) -> int:
    return -(-size // PAGE)


def copy_verified(source: Source, source_fd: int, target_fd: int, progress: Progress) -> None:
    """Fill the target, which is as large as the source in whole pages; `progress` gets 0.0 to 1.0.

    What the pages hold in the end is what is hashed, so neither a damaged source nor a bad copy passes.
    """
    size = os.fstat(source_fd).st_size
    try:
        mapping = mmap.mmap(target_fd, count_pages(size) * PAGE)
    except OSError as error:
        raise NoHugepages(f"no huge pages for image '{source.image}': {error.strerror}") from error
    passes = 2 if source.digest else 3
    with mapping, memoryview(mapping) as pages:
        for done in _fill(source, source_fd, pages, size):
            progress(done / size / passes)
        wanted = source.digest
        if not wanted:
            wanted = _hash_file(source, source_fd, lambda part: progress((1 + part) / passes))
        found = _hash(pages, size, lambda part: progress((passes - 1 + part) / passes))
    if found != wanted:
        raise StartFailed(
            f"{source.path} is damaged: its SHA-256 is {found[:16]}..., and should be {wanted[:16]}...",
            f"sudo vmsilo image build {source.image}",
        )


def _fill(source: Source, fd: int, pages: memoryview, size: int) -> Iterator[int]:
    """Yields the bytes copied so far."""
    done = 0
    while done < size:
        done += _read(source, fd, pages[done : min(done + CHUNK, size)], done)
        yield done


def _read(source: Source, fd: int, target: memoryview, offset: int) -> int:
    """At least one byte."""
    try:
        count = os.preadv(fd, [target], offset)
    except OSError as error:
        raise StartFailed(f"cannot read {source.path}: {error.strerror}") from error
    finally:
        target.release()
    if not count:
        raise StartFailed(f"{source.path} became shorter while it was read")
    return count


def _hash(pages: memoryview, size: int, progress: Progress) -> str:
    digest = hashlib.sha256()
    for start in range(0, size, CHUNK):
        with pages[start : min(start + CHUNK, size)] as part:
            digest.update(part)
        progress(start / size)
    return digest.hexdigest()


def _hash_file(source: Source, fd: int, progress: Progress) -> str:
    size = os.fstat(fd).st_size
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    done = 0
    while done < size:
        count = _read(source, fd, buffer[: min(CHUNK, size - done)], done)
        digest.update(buffer[:count])
        done += count
        progress(done / size)
    return digest.hexdigest()
