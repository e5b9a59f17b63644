"""Leases: records, run-time directories, CIDs, boot files, the initrd with the secret."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
from typing import TYPE_CHECKING

import pytest
from vmsilod.errors import StartFailed
from vmsilod.resources import image, record, rundir, vsock
from vmsilod.resources.image import BootChoice

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "ab" * 32
RECORD = record.Record(
    "banking", "vmsilo-banking-vm.service", "a1", "qemu", 61234, 3, hybrid=True, config="{}"
)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for version in ("one", "two"):
        directory = tmp_path / "default" / version
        directory.mkdir(parents=True)
        for name in ("vmlinuz", "initrd", "root.erofs", "manifest.json"):
            (directory / name).write_text("{}" if name == "manifest.json" else f"{version} {name}")
    (tmp_path / "default" / "current").symlink_to("one")
    return tmp_path


def test_records_survive_and_half_written_ones_do_not_count(tmp_path: Path) -> None:
    record.save_record(RECORD, tmp_path)
    assert stat.S_IMODE((tmp_path / "banking.json").stat().st_mode) == 0o600
    (tmp_path / ".work.json.new").write_text('{"name": ')
    assert record.load_records(tmp_path) == {"banking": RECORD}
    record.forget_record("banking", tmp_path)
    record.forget_record("banking", tmp_path)
    assert record.load_records(tmp_path) == {}


def test_cids_only_grow(tmp_path: Path) -> None:
    counter = tmp_path / "state" / "next-cid"
    first = [vsock.next_cid(counter) for _ in range(3)]
    assert first == [vsock.FIRST_CID, vsock.FIRST_CID + 1, vsock.FIRST_CID + 2]
    counter.write_text("garbage")
    assert vsock.next_cid(counter) == vsock.FIRST_CID


def test_a_rundir_is_fresh_and_goes_without_following_links(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    root = tmp_path / "vm"
    path = rundir.create_rundir("banking", root)
    shared = rundir.create_vsock_dir(path)
    assert stat.S_IMODE(shared.stat().st_mode) == 0o700
    rundir.hand_over_vsock_dir(shared, os.getuid(), os.getgid())
    assert stat.S_IMODE(path.stat().st_mode) == 0o711
    assert stat.S_IMODE(shared.stat().st_mode) == 0o770
    (shared / "link").symlink_to(precious)
    rundir.create_rundir("banking", root)
    assert list((root / "banking").iterdir()) == []
    rundir.remove_rundir("banking", root)
    assert not (root / "banking").exists()
    assert (precious / "file").read_text() == "kept"


def test_a_listener_has_its_mode_from_the_start(tmp_path: Path) -> None:
    fd = rundir.bind_listener(tmp_path / "monitor.sock", socket.SOCK_SEQPACKET, 0o600)
    with (
        socket.socket(fileno=fd) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client,
    ):
        assert stat.S_IMODE((tmp_path / "monitor.sock").stat().st_mode) == 0o600
        client.connect(str(tmp_path / "monitor.sock"))
        listener.accept()[0].close()


def test_all_boot_files_are_of_one_version(images: Path) -> None:
    files = image.find_boot_files(BootChoice("default"), images)
    link = images / "default" / "current"
    link.unlink()
    link.symlink_to("two")
    assert {path.read_text().split()[0] for path in (files.kernel, files.root)} == {"one"}
    assert image.find_boot_files(BootChoice("default"), images).version == "two"


def test_a_start_keeps_its_version_when_another_becomes_current(images: Path) -> None:
    pinned = image.pin_version(BootChoice("default", initramfs="/own"), images)
    link = images / "default" / "current"
    link.unlink()
    link.symlink_to("two")
    files = image.find_boot_files(pinned, images)
    assert files.version == "one"
    assert files.root.read_text().split()[0] == "one"
    own = BootChoice("gone", kernel="/k", root_disk="/d")
    assert image.pin_version(own, images) == own


def test_the_guests_user_is_the_manifests(images: Path) -> None:
    manifest = images / "default" / "one" / "manifest.json"
    assert image.find_boot_files(BootChoice("default"), images).login == "user"
    manifest.write_text(json.dumps({"user": "anna"}))
    assert image.find_boot_files(BootChoice("default"), images).login == "anna"
    wrong: tuple[object, ...] = ({"user": "../x"}, {"user": 5}, [])
    for bad in wrong:
        manifest.write_text(json.dumps(bad))
        with pytest.raises(StartFailed):
            image.find_boot_files(BootChoice("default"), images)


def test_a_missing_image_says_how_to_build_it(images: Path) -> None:
    with pytest.raises(StartFailed) as caught:
        image.find_boot_files(BootChoice("work"), images)
    assert "vmsilo image build work" in caught.value.hint


def test_own_files_replace_those_of_the_image(images: Path, tmp_path: Path) -> None:
    files = image.find_boot_files(BootChoice("default", kernel="/boot/own"), images)
    assert (str(files.kernel), files.initrd) == ("/boot/own", None)
    nothing = image.find_boot_files(BootChoice("gone", kernel="/k", root_disk="/d"), tmp_path / "none")
    assert (str(nothing.root), nothing.version) == ("/d", "custom")


def test_the_secret_is_behind_the_initrd_and_sealed(images: Path) -> None:
    (images / "odd").write_bytes(b"x" * 13)
    fd = image.make_initrd(images / "odd", SECRET)
    try:
        data = os.pread(fd, 1 << 20, 0)
        assert data.startswith(b"x" * 13 + b"\0" * 3 + b"070701")
        assert data.count(SECRET.encode()) == 1
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
        with pytest.raises(PermissionError):
            os.write(fd, b"changed")
    finally:
        os.close(fd)


def test_network_files_are_behind_the_initrd() -> None:
    fd = image.make_initrd(None, SECRET, network={"network/10-vmsilo-wan.link": "[Link]\nName=wan\n"})
    try:
        assert b"[Link]\nName=wan\n" in os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)


def test_initrd_as_a_nameless_file_is_for_reading_only(images: Path, tmp_path: Path) -> None:
    (images / "odd").write_bytes(b"x" * 13)
    before = set(tmp_path.iterdir())
    fd = image.make_initrd(images / "odd", SECRET, None, tmp_path)
    try:
        assert os.pread(fd, 1 << 20, 0).count(SECRET.encode()) == 1
        status = os.fstat(fd)
        assert (status.st_mode & 0o777, status.st_nlink) == (0o444, 0)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"changed")
        assert set(tmp_path.iterdir()) == before
    finally:
        os.close(fd)


def test_root_is_persistent_memory_only_where_image_and_size_say_so(images: Path, tmp_path: Path) -> None:
    (images / "default/one/manifest.json").write_text('{"pmem": true}')
    files = image.find_boot_files(BootChoice("default"), images)
    assert files.pmem
    assert not image.find_boot_files(BootChoice("default", initramfs="/own"), images).pmem
    assert not image.find_boot_files(BootChoice("default", root_disk="/own"), images).pmem
    for size, expected in ((4 << 20, True), ((4 << 20) + 4096, False)):
        (tmp_path / "root").touch()
        os.truncate(tmp_path / "root", size)
        fd = os.open(tmp_path / "root", os.O_RDONLY)
        assert image.is_pmem(files, fd) is expected
        os.close(fd)


def test_only_files_and_block_devices_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "none"):
        with pytest.raises(StartFailed):
            image.open_file(path)


def test_records_are_plain_json(tmp_path: Path) -> None:
    record.save_record(RECORD, tmp_path)
    assert json.loads((tmp_path / "banking.json").read_text())["cid"] == 3


def test_records_of_another_version_are_kept(tmp_path: Path) -> None:
    content = {"name": "banking", "unit": "vmsilo-banking-vm.service", "invocation": "a1", "new_in_later": 1}
    (tmp_path / "banking.json").write_text(json.dumps(content))
    (tmp_path / "broken.json").write_text("[]")
    assert record.load_records(tmp_path)["banking"].invocation == "a1"
    assert (tmp_path / "broken.json").exists()


def test_a_rundir_of_any_depth_goes(tmp_path: Path) -> None:
    path = rundir.create_rundir("banking", tmp_path / "vm")
    here = os.open(path, os.O_DIRECTORY)
    for _ in range(3000):  # deeper than Python's recursion and than PATH_MAX
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    rundir.remove_rundir("banking", tmp_path / "vm")
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives files to another user")
def test_a_user_cannot_lead_root_to_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("root's")
    home = tmp_path / "home"
    home.mkdir()
    (home / "own").write_text("alice's")
    (home / "to-own").symlink_to("own")
    (home / "to-secret").symlink_to(tmp_path / "secret")
    (home / "up").symlink_to("..")
    for path in (home, *home.iterdir()):
        os.chown(path, 1000, 1000, follow_symlinks=False)
    for good in (home / "own", home / "to-own", tmp_path / "secret"):
        os.close(image.open_file(good))
    for bad in (home / "to-secret", home / "up" / "secret"):
        with pytest.raises(StartFailed, match="belongs to uid 1000"):
            image.open_file(bad)
    (home / "planted").write_text("a hard link or a file that root left here")
    with pytest.raises(StartFailed):
        image.open_file(home / "planted")


def test_a_link_in_a_circle_ends(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(StartFailed, match="too many"):
        image.open_file(tmp_path / "a")
