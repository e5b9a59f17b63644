"""The scroll-back of one run: the last CAPACITY bytes of its console, in memory that outlives the process.

The memory is a memfd that systemd keeps, so a consoled that was killed goes on with it. A position counts
bytes since the run began. Owned by its Console and by clients that still read a run that has ended; the
mapping goes when the last of them does. Nothing here knows what the bytes mean.
"""

from __future__ import annotations

import mmap
import os
import struct

CAPACITY = 256 * 1024
READ_MAX = 32 * 1024  # bytes taken at once; they never overwrite what counts as kept
SIZE = CAPACITY + READ_MAX
HEADER_SIZE = 4096
HEADER = struct.Struct("<8sQ")  # magic, total
MAGIC = b"vmsicon1"
LINE_MAX = 4096  # how far a history is cut to begin with a line


def create_memory() -> int:
    """A descriptor for a Ring; raises OSError."""
    fd = os.memfd_create("vmsilo-console", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, HEADER_SIZE + SIZE)
    except OSError:
        os.close(fd)
        raise
    return fd


class Ring:
    """`memory` stays the caller's; the mapping holds a descriptor of its own. Raises OSError, ValueError."""

    def __init__(self, memory: int) -> None:
        if os.fstat(memory).st_size != HEADER_SIZE + SIZE:
            raise ValueError("the scroll-back has another size")
        self._map = mmap.mmap(memory, HEADER_SIZE + SIZE)
        self._data = memoryview(self._map)[HEADER_SIZE:]
        magic, total = HEADER.unpack_from(self._map)
        self.total: int = total if magic == MAGIC else 0
        if magic != MAGIC:
            HEADER.pack_into(self._map, 0, MAGIC, 0)

    @property
    def oldest(self) -> int:
        return max(0, self.total - CAPACITY)

    def fill(self, fd: int) -> int:
        """Take what `fd` has, at most READ_MAX; 0 at its end. Raises OSError, BlockingIOError if nothing."""
        at = self.total % SIZE
        end = min(SIZE, at + READ_MAX)
        count = os.readv(fd, [self._data[at:end], self._data[: READ_MAX - (end - at)]])
        self.total += count
        # Last: a kill before this loses the bytes just read, and tears nothing that was there.
        HEADER.pack_into(self._map, 0, MAGIC, self.total)
        return count

    def read(self, position: int, count: int) -> bytes:
        """At most `count` bytes from `position`, which is not older than `oldest`."""
        count = min(count, self.total - position)
        at = position % SIZE
        head = bytes(self._data[at : at + count])
        return head + bytes(self._data[: count - len(head)])

    def find_history(self) -> int:
        """Where a reader of everything begins: with a line, if the beginning was overwritten."""
        start = self.oldest
        if start == 0:
            return 0
        return start + self.read(start, LINE_MAX).find(b"\n") + 1
