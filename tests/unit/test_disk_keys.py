"""One disk, whatever it is called and whatever it is a part of: with loop devices of this machine, and with
trees like those of sysfs for partitions. Which of two VMs is refused.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from vmsilod.disk_claims import Claim, refuse_conflicts, refuse_twice
from vmsilod.errors import StartFailed
from vmsilod.resources import loop_devices
from vmsilod.resources.disk_keys import backing_of, key_of, key_of_status, relatives_of
from vmsilod.resources.loop_devices import find_loops, parse_answer, refuse_loop_device

if TYPE_CHECKING:
    from collections.abc import Iterator

PART, OTHER, DISK, FILE = "block:259:3", "block:259:4", "block:7:7", "file:1:2"


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def loop_of(file: Path, *options: str) -> Iterator[Path]:
    made = subprocess.run(
        ["losetup", "-f", "--show", *options, str(file)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)


def test_one_disk_has_one_key_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "hard").hardlink_to(tmp_path / "a")
    (tmp_path / "other").write_bytes(b"")
    keys = []
    for name in ("a", "link", "hard", "other"):
        with opened(tmp_path / name) as fd:
            keys.append(key_of(fd))
            assert relatives_of(fd) == set()
    assert keys[0] == keys[1] == keys[2] != keys[3]


@pytest.mark.parametrize(
    ("options", "writable", "refused"),
    [((), True, True), (("-r",), True, True), ((), False, True), (("-r",), False, False)],
)
def test_file_that_the_host_has_as_a_loop_device(
    tmp_path: Path, options: tuple[str, ...], *, writable: bool, refused: bool
) -> None:
    path = tmp_path / "data img"
    path.write_bytes(bytes(4096))
    with loop_of(path, *options) as device, opened(path) as fd:
        if not refused:
            refuse_loop_device(fd, "disk 'd'", writable=writable)
            return
        with pytest.raises(StartFailed, match=f"disk 'd' is in use by the host as {device}$"):
            refuse_loop_device(fd, "disk 'd'", writable=writable)


def test_name_of_a_loop_devices_file_says_nothing(tmp_path: Path) -> None:
    """It need not be text, it may be gone while the file is not, and another may have it by now."""
    file, ours, innocent = tmp_path / os.fsdecode(b"\xe4.iso"), tmp_path / "ours", tmp_path / "innocent"
    file.write_bytes(bytes(4096))
    innocent.write_bytes(bytes(4096))
    ours.hardlink_to(file)
    with loop_of(file), opened(ours) as fd, opened(innocent) as other:
        file.unlink()
        (tmp_path / os.fsdecode(b"\xe4.iso (deleted)")).symlink_to(innocent)
        with pytest.raises(StartFailed, match="in use by the host"):
            refuse_loop_device(fd, "disk 'd'", writable=False)
        refuse_loop_device(other, "disk 'd'", writable=True)


def test_loop_device_is_its_file(tmp_path: Path) -> None:
    file = tmp_path / "data.img"
    file.write_bytes(bytes(4096))
    with loop_of(file) as device, opened(device) as fd:
        assert relatives_of(fd) == {key_of_status(file.stat())}
        assert backing_of(fd) == key_of_status(file.stat())
    with opened(file) as fd:
        assert backing_of(fd) == ""


def test_loop_device_of_a_part_of_a_file_has_not_all_of_it(tmp_path: Path) -> None:
    file = tmp_path / "data.img"
    file.write_bytes(bytes(8192))
    with loop_of(file, "-o", "4096") as device, opened(device) as fd:
        assert relatives_of(fd) == {key_of_status(file.stat())}
        assert backing_of(fd) == ""


def test_loop_device_is_the_device_below_it(tmp_path: Path) -> None:
    file = tmp_path / "data.img"
    file.write_bytes(bytes(8192))
    with loop_of(file) as below, loop_of(below) as device, opened(device) as fd:
        assert relatives_of(fd) == {key_of_status(below.stat())}
        assert backing_of(fd) == key_of_status(below.stat())


def test_loop_device_that_does_not_answer_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked again when who asked it has ended."""
    file = tmp_path / "data.img"
    file.write_bytes(bytes(4096))
    with (
        loop_of(file) as one,
        loop_of(file) as two,
        subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE) as stuck,
    ):
        device, other = sorted((one, two))
        loop, other_loop = ((str(each), key_of_status(file.stat()), False) for each in (device, other))
        hang = f'[ "$0" != {device} ] || exec sleep 60; exec {" ".join(loop_devices.ASK)} "$0"'
        with monkeypatch.context() as patch:
            patch.setattr(loop_devices, "ANSWER_SECONDS", 1.0)
            found = find_loops(("sh", "-c", hang))
        assert loop not in found
        assert other_loop in found  # which was asked after the one that hangs
        assert f"{device} does not answer" in caplog.text
        assert f"{other} does not answer" not in caplog.text
        monkeypatch.setitem(loop_devices._silent, str(device), stuck)
        assert loop not in find_loops()
        stuck.kill()
        stuck.wait()
        assert loop in find_loops()


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b"", []),
        (b"{}", []),
        (
            b'{"loopdevices": [{"back-ino": 7, "back-maj:min": "254:1", "ro": false}]}',
            [("/dev/loop0", f"file:{os.makedev(254, 1)}:7", False)],
        ),
        (
            b'{"loopdevices": [{"back-ino": "7", "back-maj:min": "  254:1", "ro": "1"}]}',
            [("/dev/loop0", f"file:{os.makedev(254, 1)}:7", True)],
        ),
        (b'{"loopdevices": [{"back-ino": null, "back-maj:min": null, "ro": false}]}', []),
    ],
)
def test_answers_of_losetup(answer: bytes, found: list[tuple[str, str, bool]]) -> None:
    assert list(parse_answer("/dev/loop0", answer)) == found


def test_disk_and_its_partitions(tmp_path: Path) -> None:
    """With the numbers of a loop device, which has a file besides."""
    file = tmp_path / "data.img"
    file.write_bytes(bytes(4096))
    with loop_of(file) as device, opened(device) as fd:
        numbers = key_of(fd).removeprefix("block:")
        for name, its in (("sda", numbers), ("sda/sda1", "259:3"), ("sda/sda2", "259:4")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "dev").write_text(f"{its}\n")
        for number in (1, 2):
            (tmp_path / f"sda/sda{number}/partition").write_text(f"{number}\n")
        (tmp_path / "sda/queue").mkdir()
        link = tmp_path / "devices" / numbers
        link.parent.mkdir()
        link.symlink_to(tmp_path / "sda")
        of_file = key_of_status(file.stat())
        assert relatives_of(fd, link.parent) == {PART, OTHER, of_file}
        # And as if it were the first of them.
        link.unlink()
        link.symlink_to(tmp_path / "sda/sda1")
        assert relatives_of(fd, link.parent) == {f"block:{numbers}", of_file}


@pytest.mark.parametrize(
    ("writes", "held", "words"),
    [
        (False, False, ""),
        (True, False, "is reading"),
        (False, True, "is writing"),
        (True, True, "is writing"),
    ],
)
def test_two_vms_and_one_disk(writes: bool, held: bool, words: str) -> None:  # noqa: FBT001 - cases
    claims = [Claim(("file:1:2",), writes, "disk 'data' (/srv/data)")]
    holders = {"work": {"file:1:2": held, "file:1:3": True}, "banking": {"file:1:2": True}}
    if not words:
        refuse_conflicts("banking", claims, holders)
        return
    with pytest.raises(StartFailed) as caught:
        refuse_conflicts("banking", claims, holders)
    assert f"disk 'data' (/srv/data): VM 'work', which runs, {words}" in str(caught.value)


@pytest.mark.parametrize(
    ("own", "relatives", "held", "refused"),
    [
        (PART, (DISK, FILE), DISK, True),
        (PART, (DISK, FILE), FILE, True),
        (PART, (DISK, FILE), OTHER, False),
        (DISK, (PART, OTHER, FILE), PART, True),
        (DISK, (PART, OTHER, FILE), FILE, True),
    ],
)
def test_two_vms_and_parts_of_one_disk(
    own: str, relatives: tuple[str, ...], held: str, *, refused: bool
) -> None:
    claims = [Claim((own, *relatives), writes=True, title="disk 'data'")]
    for writes in (False, True):
        if not refused:
            refuse_conflicts("banking", claims, {"work": {held: writes}})
            continue
        with pytest.raises(StartFailed, match="VM 'work', which runs"):
            refuse_conflicts("banking", claims, {"work": {held: writes}})


def test_two_loop_devices_of_one_file() -> None:
    """The one that a VM has, and with it all of the file."""
    claim = Claim(("block:7:1", FILE), writes=True, title="disk 'data'", backing=FILE)
    with pytest.raises(StartFailed, match="VM 'work', which runs"):
        refuse_conflicts("banking", [claim], {"work": {"block:7:0": True, FILE: True}})
    first = Claim(("block:7:0", FILE), writes=True, title="disk 'first'", backing=FILE)
    with pytest.raises(StartFailed, match="has one disk twice"):
        refuse_twice("work", [first, claim])


@pytest.mark.parametrize("order", [1, -1])
def test_one_vm_and_a_disk_and_its_part(order: int) -> None:
    both = [
        Claim((PART, DISK), writes=False, title="disk 'a'"),
        Claim((DISK, PART, OTHER), writes=False, title="disk 'b'"),
    ]
    with pytest.raises(StartFailed, match=r"VM 'work' has one disk twice: disk '[ab]', disk '[ab]'$"):
        refuse_twice("work", both[::order])
    refuse_twice("work", [both[0], Claim((OTHER, DISK), writes=True, title="disk 'c'")])
