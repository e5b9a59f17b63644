"""What a disk begins with, against what its configuration says."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest
from vmsilod.errors import StartFailed
from vmsilod.resources.disk_format import check_format, find_disk_format, find_qcow2_fault

if TYPE_CHECKING:
    from pathlib import Path

    from vmsilod.resources.disk_format import Format


def qcow2(version: int = 3, backing: tuple[int, int] = (0, 0), incompatible: int = 0) -> bytes:
    head = b"QFI\xfb" + struct.pack(">IQI", version, *backing)
    return head.ljust(72, b"\0") + struct.pack(">Q", incompatible) + bytes(432)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"QFI\xfb\0\0\0\3", "qcow2"),
        (b"composite_disk\x1d\0", "crosvm composite disk"),
        (b"\x3a\xff\x26\xed", "Android sparse image"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x5f\x2a\x4d\x18", "zstd"),
        (b"\x60\x2a\x4d\x18", None),
        (bytes(512), None),
        (b"", None),
        (b"QFI", None),
    ],
)
def test_disk_format_that_crosvm_would_detect(head: bytes, expected: str | None) -> None:
    assert find_disk_format(head) == expected


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (qcow2(), None),
        (qcow2(version=2), None),
        (qcow2(incompatible=0b1), None),
        (qcow2(backing=(512, 11)), "backing file"),
        (qcow2(version=2, backing=(512, 11)), "backing file"),
        (qcow2(backing=(512, 0)), "backing file"),
        (qcow2(incompatible=0b100), "external data file"),
        (qcow2(incompatible=1 << 40), "does not know"),
        (qcow2(version=4), "version 4"),
        (qcow2()[:80], "ends early"),
        (b"QFI\xfb", "does not begin"),
        (bytes(512), "does not begin"),
        (b"", "does not begin"),
    ],
)
def test_qcow2_that_stands_alone(head: bytes, word: str | None) -> None:
    fault = find_qcow2_fault(head)
    assert fault is None if word is None else word in (fault or "")


@pytest.mark.parametrize(
    ("content", "declared", "word"),
    [
        (bytes(4096), "raw", ""),
        (b"", "raw", ""),
        (qcow2(backing=(512, 11)), "raw", "begins like a qcow2 image"),
        (qcow2(), "raw", "begins like a qcow2 image"),
        (qcow2(), "qcow2", ""),
        (bytes(4096), "qcow2", "does not begin"),
        (qcow2(backing=(512, 11)), "qcow2", "backing file"),
    ],
)
def test_disk_is_what_was_declared(content: bytes, declared: Format, word: str, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDWR)
    try:
        if not word:
            check_format(fd, declared, "disk 'data'")
            return
        with pytest.raises(StartFailed, match=word) as caught:
            check_format(fd, declared, "disk 'data'")
        assert "disk 'data'" in str(caught.value)
    finally:
        os.close(fd)
