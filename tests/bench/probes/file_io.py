"""Argument: a directory. Prints MB/s as JSON: a file written and read in one go, then in random pages.

What was written is on the disk of whoever keeps it (fsync) within the time; what is read is not in the page
cache of this kernel (POSIX_FADV_DONTNEED), as far as it can be asked for that.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SIZE = 64 << 20
BLOCK = 1 << 20
PAGE = 4096
PAGES = 2000


def main() -> None:
    path = os.path.join(sys.argv[1], f"file-io-{os.getpid()}")  # noqa: PTH118 - few imports
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.unlink(path)  # noqa: PTH108 - as above
        offsets = [random.randrange(SIZE // PAGE) * PAGE for _ in range(PAGES)]
        found = {
            "write": rate(SIZE, lambda: write(fd, range(0, SIZE, BLOCK), bytes(BLOCK))),
            "read": rate(SIZE, lambda: read(fd, range(0, SIZE, BLOCK), BLOCK)),
            "random write": rate(PAGES * PAGE, lambda: write(fd, offsets, bytes(PAGE))),
            "random read": rate(PAGES * PAGE, lambda: read(fd, offsets, PAGE)),
        }
    finally:
        os.close(fd)
    print(json.dumps(found))


def rate(size: int, work: Callable[[], None]) -> float:
    begin = time.monotonic()
    work()
    return size / 1e6 / (time.monotonic() - begin)


def write(fd: int, offsets: Iterable[int], data: bytes) -> None:
    for offset in offsets:
        os.pwrite(fd, data, offset)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def read(fd: int, offsets: Iterable[int], length: int) -> None:
    for offset in offsets:
        assert len(os.pread(fd, length, offset)) == length
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


main()
