"""What was truncated, altered or writable by others is refused, and bytes are read once."""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING

import pytest
from image_tree import FIRST, SECOND, make_version
from vmsilo_image import integrity
from vmsilo_image.errors import ImageError
from vmsilo_image.integrity import check_version, verify_version
from vmsilod.errors import StartFailed
from vmsilod.resources.image import BootChoice, find_boot_files
from vmsilod.resources.image_check import require_whole

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def version(tmp_path: Path) -> Path:
    return make_version(tmp_path / "images", "web", FIRST)


@pytest.fixture
def checked(tmp_path: Path) -> Path:
    return tmp_path / "checked"


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each file whose bytes were read."""
    found: list[int] = []
    read = integrity.hash_descriptor

    def count(fd: int) -> str:
        found.append(fd)
        return read(fd)

    monkeypatch.setattr(integrity, "hash_descriptor", count)
    return found


def test_bytes_are_read_once(version: Path, checked: Path, readings: list[int]) -> None:
    check_version(version, ["root.erofs", "vmlinuz"], checked)
    check_version(version, ["root.erofs"], checked)
    assert len(readings) == 2
    check_version(version, None, checked)  # the initrd and the list of packages are new to it
    check_version(version, None, checked)
    read = len(readings)
    verify_version(version, checked)
    assert len(readings) == read + 4
    assert checked.stat().st_mode & 0o777 == 0o700


def test_vms_that_start_at_once_read_an_image_once(
    version: Path, checked: Path, readings: list[int]
) -> None:
    threads = [threading.Thread(target=check_version, args=(version, None, checked)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(readings) == 4


def same_times(path: Path, change: Callable[[], object]) -> None:
    status = path.stat()
    change()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))


def test_a_changed_byte_is_found_although_it_was_good_before(version: Path, checked: Path) -> None:
    """Size and modification time are as they were: the kernel's ctime is not."""
    check_version(version, None, checked)
    root = version / "root.erofs"
    same_times(root, lambda: flip(root))
    with pytest.raises(ImageError, match=r"root\.erofs is altered: its SHA-256 is not that of the build"):
        check_version(version, None, checked)
    with pytest.raises(ImageError):
        check_version(version, ["root.erofs"], checked)
    check_version(version, ["vmlinuz"], checked)


def test_a_truncated_file_is_found_before_it_is_read(
    version: Path, checked: Path, readings: list[int]
) -> None:
    os.truncate(version / "root.erofs", 3)
    with pytest.raises(ImageError, match=r"root\.erofs is truncated: 3 bytes, not 29") as caught:
        check_version(version, None, checked)
    assert caught.value.hint == "sudo vmsilo image build web"
    assert not readings
    second = make_version(version.parent.parent, "web", SECOND)
    with pytest.raises(ImageError) as caught:
        check_version(version, None, checked)
    assert caught.value.hint == "sudo vmsilo image build web"  # it is the previous one itself
    os.truncate(second / "root.erofs", 3)
    with pytest.raises(ImageError) as caught:
        check_version(second, None, checked)
    assert caught.value.hint == "sudo vmsilo image use web previous, or sudo vmsilo image build web"


@pytest.mark.parametrize("name", ["root.erofs", "vmlinuz", "initrd"])
def test_a_missing_file(version: Path, checked: Path, name: str) -> None:
    (version / name).unlink()
    with pytest.raises(ImageError, match=f"{name} cannot be read: No such file"):
        check_version(version, None, checked)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sha256": 1}', '{"sha256": {"vmlinuz": "x"}}'])
def test_a_manifest_that_says_nothing(version: Path, checked: Path, text: str) -> None:
    (version / "manifest.json").write_text(text)
    with pytest.raises(ImageError, match="manifest"):
        check_version(version, ["root.erofs"], checked)


def test_who_else_could_write_it(version: Path, checked: Path) -> None:
    for place in (version / "root.erofs", version, version.parent, version.parent.parent):
        before = place.stat().st_mode
        place.chmod(before | 0o020)
        with pytest.raises(ImageError, match=f"{place.name} can be written by others than root"):
            check_version(version, None, checked)
        place.chmod(before)
    check_version(version, None, checked)
    if os.geteuid() == 0:
        os.chown(version / "initrd", 1000, 1000)
        with pytest.raises(ImageError, match=r"initrd can be written by others than root \(uid 1000, mode"):
            check_version(version, None, checked)


def test_a_link_and_a_pipe_are_not_followed(version: Path, checked: Path) -> None:
    (version / "initrd").rename(version.parent / "elsewhere")
    (version / "initrd").symlink_to("../elsewhere")
    with pytest.raises(ImageError, match="initrd is a symbolic link"):
        check_version(version, None, checked)
    (version / "initrd").unlink()
    os.mkfifo(version / "initrd")
    with pytest.raises(ImageError, match="initrd is not a file"):
        check_version(version, None, checked)


def test_what_cannot_be_remembered_is_checked_all_the_same(version: Path, readings: list[int]) -> None:
    nowhere = version / "manifest.json" / "checked"
    check_version(version, None, nowhere)
    check_version(version, None, nowhere)
    assert len(readings) == 8


@pytest.mark.parametrize("text", ["", "[]", '{"root.erofs": []}'])
def test_a_damaged_memory_is_no_memory(version: Path, checked: Path, text: str) -> None:
    check_version(version, None, checked)
    (memory,) = checked.iterdir()
    memory.write_text(text)
    flip(version / "root.erofs")
    with pytest.raises(ImageError, match="altered"):
        check_version(version, None, checked)


def test_a_start_is_refused_with_what_to_do(version: Path, checked: Path) -> None:
    files = find_boot_files(BootChoice("web"), version.parent.parent)
    require_whole(files, checked)
    os.truncate(version / "root.erofs", 3)
    with pytest.raises(StartFailed, match="is truncated") as caught:
        require_whole(files, checked)
    assert caught.value.hint == "sudo vmsilo image build web"


def test_only_what_is_of_the_image_is_checked(version: Path, checked: Path) -> None:
    images = version.parent.parent
    flip(version / "vmlinuz")
    require_whole(find_boot_files(BootChoice("web", kernel="/boot/own"), images), checked)
    require_whole(find_boot_files(BootChoice("x", kernel="/boot/own", root_disk="/own"), images), checked)
    with pytest.raises(StartFailed, match="vmlinuz is altered"):
        require_whole(find_boot_files(BootChoice("web", root_disk="/own"), images), checked)


def test_a_version_of_an_older_builder_has_no_sizes(version: Path, checked: Path) -> None:
    manifest = json.loads((version / "manifest.json").read_text())
    del manifest["sizes"]
    (version / "manifest.json").write_text(json.dumps(manifest))
    check_version(version, None, checked)
    os.truncate(version / "root.erofs", 3)
    with pytest.raises(ImageError, match="altered"):
        check_version(version, None, checked)
