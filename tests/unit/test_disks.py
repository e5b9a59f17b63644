"""Disks as files: made whole or not at all, nameless where they are to leave nothing, locked, told apart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from vmsilod.config.disks import AdditionalDisk
from vmsilod.errors import StartFailed
from vmsilod.resources import disks, filesystems
from vmsilod.resources.disk_keys import key_of
from vmsilod.resources.disks import OpenDisk, Vmm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REPO = Path(__file__).parents[2]
ME = Vmm(os.getuid(), os.getgid(), guest_uid=os.getuid())
EXT4_MAGIC = b"\x53\xef"
MIB = 1 << 20


def additional(path: Path, size: str = "16M", **more: object) -> AdditionalDisk:
    content = {"path": str(path), "id": "data", "create": {"size": size}, **more}
    return AdditionalDisk.model_validate(content)


def in_child(code: str, directory: Path) -> int:
    """Exit status of a Python that has D for the directory; as subprocess has it."""
    head = (
        "import os, sys\nfrom pathlib import Path\nfrom vmsilod.config.disks import *\n"
        "from vmsilod.resources import disks, filesystems\n"
        f"D = Path({str(directory)!r})\nME = disks.Vmm(os.getuid(), os.getgid())\n"
    )
    env = {"PYTHONPATH": f"{REPO}/daemon:{REPO}/guest", "PATH": os.environ["PATH"]}
    return subprocess.run([sys.executable, "-c", head + code], env=env, check=False).returncode


def test_overlay_has_no_name_at_any_time(tmp_path: Path) -> None:
    overlay = disks.make_overlay(1 << 30, ME, tmp_path)
    try:
        status = os.fstat(overlay.fd)
        assert (status.st_nlink, status.st_size, status.st_mode & 0o777) == (0, 1 << 30, 0o600)
        assert status.st_blocks * 512 < MIB
        assert os.pread(overlay.fd, 2, 1024 + 56) == EXT4_MAGIC
        assert list(tmp_path.iterdir()) == []
        assert tmp_path.stat().st_mode & 0o777 == 0o700
    finally:
        os.close(overlay.fd)


def test_overlay_that_its_guest_encrypts_is_empty(tmp_path: Path) -> None:
    overlay = disks.make_overlay(1 << 30, ME, tmp_path, encrypted=True)
    try:
        assert (os.fstat(overlay.fd).st_size, os.fstat(overlay.fd).st_blocks) == (1 << 30, 0)
        assert overlay.serial == "vmsilo-crypt"
    finally:
        os.close(overlay.fd)


def test_second_overlay_of_a_size_is_the_same_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystems, "_TEMPLATES", {})
    first = disks.make_overlay(10 << 30, ME, tmp_path)
    monkeypatch.setattr(filesystems, "MKFS", "/missing")
    second = disks.make_overlay(10 << 30, ME, tmp_path)
    try:
        argv = ["e2fsck", "-fn", f"/proc/self/fd/{second.fd}"]
        env = {"PATH": "/usr/sbin:/sbin:/usr/bin"}
        done = subprocess.run(argv, env=env, pass_fds=[second.fd], capture_output=True, check=False)
        assert done.returncode == 0, done.stdout
        assert os.fstat(second.fd).st_blocks * 512 < MIB
        assert os.pread(first.fd, 1 << 16, 0) == os.pread(second.fd, 1 << 16, 0)
    finally:
        os.close(first.fd)
        os.close(second.fd)
    with pytest.raises(StartFailed, match="missing"):
        disks.make_overlay(11 << 30, ME, tmp_path)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_overlay_of_a_killed_process_is_gone(moment: str, tmp_path: Path) -> None:
    script = tmp_path / "mkfs"
    script.write_text("#!/bin/sh\nkill -9 $PPID\n")
    script.chmod(0o755)
    place = tmp_path / "overlays"
    code = f"filesystems.MKFS = {str(script)!r}\n" if moment == "before" else ""
    code += "disks.make_overlay(1 << 30, ME, D)\nos.kill(os.getpid(), 9)\n"
    assert in_child(code, place) == -signal.SIGKILL
    assert list(place.iterdir()) == []


def test_missing_mke2fs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "MKFS", str(tmp_path / "missing"))
    with pytest.raises(StartFailed) as caught:
        disks.make_overlay(MIB * 16, ME, tmp_path)
    assert caught.value.hint == "install e2fsprogs"


def test_kept_paths_have_one_disk_that_only_grows(tmp_path: Path) -> None:
    path = disks.find_persist("banking", tmp_path)
    for size, expected in ((32, 32), (64, 64), (16, 64)):
        disk = disks.open_persist("banking", size * MIB, ME, tmp_path)
        inode = os.fstat(disk.fd).st_ino
        os.close(disk.fd)
        assert (path.stat().st_ino, path.stat().st_size) == (inode, expected * MIB)
    assert [each.name for each in tmp_path.iterdir()] == ["banking.img"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_disk_is_created_once_and_found_again(tmp_path: Path) -> None:
    disk = additional(tmp_path / "data.img")
    first = disks.open_additional(disk, ME)
    os.pwrite(first.fd, b"mine", 8 * MIB)
    os.close(first.fd)
    again = disks.open_additional(disk, ME)
    assert os.pread(again.fd, 4, 8 * MIB) == b"mine"
    assert os.pread(again.fd, 2, 1024 + 56) == EXT4_MAGIC
    os.close(again.fd)
    status = (tmp_path / "data.img").stat()
    assert (status.st_uid, status.st_mode & 0o777) == (tmp_path.stat().st_uid, 0o600)


def test_disk_without_a_file_system_that_takes_its_blocks(tmp_path: Path) -> None:
    disk = additional(tmp_path / "bare", sparse=False, create={"size": "16M", "filesystem": "none"})
    opened = disks.open_additional(disk, ME)
    assert os.pread(opened.fd, 4096, 0) == bytes(4096)
    assert os.fstat(opened.fd).st_blocks * 512 >= 16 * MIB
    os.close(opened.fd)


@pytest.mark.parametrize("end", ["kill -9 $PPID", "echo 'no space left' >&2; exit 1"])
def test_half_made_disk_leaves_nothing(end: str, tmp_path: Path) -> None:
    script = tmp_path / "mkfs"
    script.write_text(f"#!/bin/sh\n{end}\n")
    script.chmod(0o755)
    place = tmp_path / "disks"
    place.mkdir()
    code = (
        f"filesystems.MKFS = {str(script)!r}\n"
        "disk = AdditionalDisk(path=str(D / 'a.img'), id='a', create=DiskCreate(size='16M'))\n"
        "disks.open_additional(disk, ME)\n"
    )
    assert in_child(code, place) != 0
    assert list(place.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a small tmpfs in a namespace of its own")
def test_full_file_system_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    code = (
        "import ctypes\nfrom vmsilod.errors import StartFailed\n"
        "libc = ctypes.CDLL(None)\n"
        "if libc.unshare(0x20000) or libc.mount(b'none', b'/', None, 0x44000, None): os._exit(77)\n"
        "if libc.mount(b't', bytes(D), b'tmpfs', 0, b'size=1m'): os._exit(77)\n"
        "disk = AdditionalDisk(path=str(D / 'a'), id='a', sparse=False, create=DiskCreate(size='16M'))\n"
        "try:\n    disks.open_additional(disk, ME)\n"
        "except StartFailed as error:\n"
        "    said = 'No space left' in str(error) and 'make room' in error.hint\n"
        "    os._exit(0 if said and not os.listdir(D) else 3)\n"
        "os._exit(4)\n"
    )
    status = in_child(code, tmp_path)
    if status == 77:
        pytest.skip("needs a mount namespace of its own")
    assert status == 0


def test_missing_disk_without_create_is_refused(tmp_path: Path) -> None:
    disk = AdditionalDisk(path=str(tmp_path / "gone"), id="gone")
    with pytest.raises(StartFailed, match="No such file"):
        disks.open_additional(disk, ME)
    assert list(tmp_path.iterdir()) == []


def test_link_of_somebody_else_is_not_followed_to_a_disk(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: gives a link to another user")
    tmp_path.chmod(0o755)
    (tmp_path / "secret").write_bytes(bytes(4096))
    link = tmp_path / "disk"
    link.symlink_to("secret")
    os.chown(link, 65001, 65001, follow_symlinks=False)
    with pytest.raises(StartFailed, match="belongs to uid 65001"):
        disks.open_additional(AdditionalDisk(path=str(link), id="x", ro=True), ME)


@pytest.fixture
def block_device(tmp_path: Path) -> Iterator[str]:
    if os.geteuid() != 0:
        pytest.skip("needs root: makes a loop device")
    image = tmp_path / "image"
    image.write_bytes(bytes(16 * MIB))
    made = subprocess.run(
        ["losetup", "-f", "--show", str(image)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"needs loop devices: {made.stderr}")
    device = made.stdout.strip()
    yield device
    subprocess.run(["losetup", "-d", device], check=True)


def test_block_device_has_one_writer_or_readers(block_device: str) -> None:
    writes = AdditionalDisk(path=block_device, id="w")
    reads = AdditionalDisk(path=block_device, id="r", ro=True)
    first = disks.open_additional(writes, ME)
    for disk in (writes, reads):
        with pytest.raises(StartFailed, match="alone: Device or resource busy"):
            disks.open_additional(disk, ME)
    os.close(first.fd)
    readers = [disks.open_additional(reads, ME) for _ in range(2)]
    assert key_of(readers[0].fd) == key_of(readers[1].fd)
    assert key_of(readers[0].fd).startswith("block:")
    for reader in readers:
        os.close(reader.fd)
    assert subprocess.run(["wipefs", "-q", block_device], check=False).returncode == 0  # it is free again


def test_lock_lasts_as_long_as_somebody_holds_the_open_file(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    first = OpenDisk(os.open(path, os.O_RDWR), "a", "disk 'a'")
    other = OpenDisk(os.open(path, os.O_RDONLY), "b", "disk 'b'", readonly=True)
    try:
        disks.lock_disks([first])
        passed = os.dup(first.fd)  # as the VMM gets it
        os.close(first.fd)
        with pytest.raises(StartFailed, match="disk 'b' is locked"):
            disks.lock_disks([other])
        os.close(passed)
        disks.lock_disks([other])
    finally:
        os.close(other.fd)


def test_readers_share_and_lock_false_asks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    fds = [os.open(path, os.O_RDONLY) for _ in range(3)]
    try:
        disks.lock_disks([OpenDisk(fd, "a", "a", readonly=True) for fd in fds[:2]])
        with pytest.raises(StartFailed):
            disks.lock_disks([OpenDisk(fds[2], "a", "a")])
        disks.lock_disks([OpenDisk(fds[2], "a", "a", lock=False)])
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize(("mode", "refused"), [(0o644, False), (0o646, True), (0o666, True), (0o664, True)])
def test_read_only_disk_that_the_vm_could_open_for_writing_is_refused(
    tmp_path: Path, mode: int, *, refused: bool
) -> None:
    path = tmp_path / "data.img"
    path.write_bytes(bytes(4096))
    path.chmod(mode)
    disk = AdditionalDisk.model_validate({"path": str(path), "id": "data", "ro": True})
    attempts: tuple[Callable[[], int], ...] = (
        lambda: disks.open_additional(disk, ME).fd,
        lambda: disks.open_root(path, ME.gid, writable=False),
    )
    for attempt in attempts:
        if refused:
            with pytest.raises(StartFailed, match="to be read-only, and its mode"):
                attempt()
        else:
            os.close(attempt())
    os.close(disks.open_root(path, ME.gid, writable=True))
