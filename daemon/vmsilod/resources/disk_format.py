"""What a disk's first bytes say, against what its configuration says.

Called in the worker before every start, for every disk, the root too, when nobody else can write it any
more. crosvm finds out a disk's format by its first bytes, and those of a disk that a guest has ever written
are the guest's: a qcow2 header names a file of the host that the next start would open. So a raw disk that
begins like something else is refused, whatever the VMM; and a qcow2 that names another file.
"""

from __future__ import annotations

import os
import struct
from typing import Literal

from vmsilod.errors import StartFailed

HEAD = 4096  # bytes, a block, so that a descriptor with O_DIRECT would do, too
Format = Literal["raw", "qcow2"]

_QCOW2 = b"QFI\xfb"
_FOREIGN_MAGIC = (
    (_QCOW2, "qcow2"),
    (b"composite_disk\x1d", "crosvm composite disk"),
    (b"\x3a\xff\x26\xed", "Android sparse image"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    # Skippable frames of zstd are 0x184D2A50 to 0x184D2A5F, little-endian.
    *((bytes((low, 0x2A, 0x4D, 0x18)), "zstd") for low in range(0x50, 0x60)),
)
# docs/interop/qcow2 of QEMU: backing_file_offset, backing_file_size at 8; from version 3 on the incompatible
# features at 72, of which bit 2 is an external data file.
_DATA_FILE = 1 << 2
_KNOWN_INCOMPATIBLE = 0b11011  # dirty, corrupt, compression type, extended L2
_HEADER_V3 = 104


def find_disk_format(head: bytes) -> str | None:
    """The format other than raw that crosvm would take a disk with these first bytes for (disk/src/disk.rs);
    17 suffice.
    """
    return next((name for magic, name in _FOREIGN_MAGIC if head.startswith(magic)), None)


def find_qcow2_fault(head: bytes) -> str | None:
    """Why these first bytes are not those of a qcow2 that stands alone."""
    if not head.startswith(_QCOW2) or len(head) < 72:
        return "does not begin like a qcow2 image"
    version, backing_offset, backing_size = struct.unpack_from(">IQI", head, 4)
    if version not in (2, 3):
        return f"is a qcow2 image of the unknown version {version}"
    if backing_offset or backing_size:
        return "is a qcow2 image with a backing file, which would be opened too"
    if version == 2:
        return None
    if len(head) < _HEADER_V3:
        return "is a qcow2 image whose header ends early"
    (incompatible,) = struct.unpack_from(">Q", head, 72)
    if incompatible & _DATA_FILE:
        return "is a qcow2 image with an external data file, which would be opened too"
    if incompatible & ~_KNOWN_INCOMPATIBLE:
        return "is a qcow2 image with features that vmsilo does not know"
    return None


def check_format(fd: int, declared: Format, title: str) -> None:
    """StartFailed where the disk `title` is not what was declared."""
    try:
        head = os.pread(fd, HEAD, 0)
    except OSError as error:
        raise StartFailed(f"cannot read {title}: {error.strerror}") from error
    if declared == "qcow2":
        if fault := find_qcow2_fault(head):
            raise StartFailed(f"{title} {fault}", 'its configuration says format = "qcow2"')
        return
    found = find_disk_format(head)
    if found is not None:
        raise StartFailed(
            f"{title} is to be a raw disk, but begins like a {found} image: a VMM may open what that names",
            "a guest that could write to it may have done that on purpose: look before you use it again",
        )
