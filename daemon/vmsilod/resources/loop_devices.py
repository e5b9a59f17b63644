"""Which files the host uses as loop devices.

Called in the worker by whoever opens a disk of a configuration. A loop device is its owner's: on a desktop
every user may make one, of a file whose file system never answers, and then whoever opens the device hangs
where no signal reaches it. So each is asked by a process of its own, and one that does not answer is passed
over: the file system of the disk in question has just answered. Asked by ioctl: the path that sysfs shows is
the owner's to change.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vmsilod.errors import StartFailed
from vmsilod.resources.disk_keys import key_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

log = logging.getLogger(__name__)

SYS_BLOCK = Path("/sys/block")
ASK = ("losetup", "--list", "--json", "--output", "BACK-INO,BACK-MAJ:MIN,RO")
ANSWER_SECONDS = 2.0  # for all of them; one takes 2 ms
LATE_SECONDS = 0.05  # to read what has been answered, when that time is over
_silent: dict[str, subprocess.Popen[bytes]] = {}  # of devices that have not answered yet


class LoopFile(NamedTuple):
    device: str  # "/dev/loop0"
    key: str  # disk_keys.key_of
    readonly: bool


def refuse_loop_device(fd: int, title: str, *, writable: bool) -> None:
    """A file that the host uses through a loop device, which holds no lock on it, may not change twice."""
    key = key_of(fd)
    for found in find_loops():
        if found.key == key and (writable or not found.readonly):
            raise StartFailed(
                f"{title} is in use by the host as {found.device}",
                f"umount it, or losetup -d {found.device}",
            )


def find_loops(command: Sequence[str] = ASK) -> list[LoopFile]:
    """Those that have a file and answer in time; `command` is one that asks losetup(8)'s question."""
    devices = [f"/dev/{entry.parent.name}" for entry in sorted(SYS_BLOCK.glob("loop*/loop"))]
    asked = [(device, _ask(command, device)) for device in devices if not _is_silent(device)]
    deadline = time.monotonic() + ANSWER_SECONDS
    found: list[LoopFile] = []
    for device, process in asked:
        try:
            answer, _ = process.communicate(timeout=max(LATE_SECONDS, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("%s does not answer: not looked at when disks are compared", device)
            process.kill()  # and not waited for
            assert process.stdout is not None
            process.stdout.close()
            _silent[device] = process
            continue
        found += parse_answer(device, answer)
    return found


def _is_silent(device: str) -> bool:
    process = _silent.get(device)
    if process is not None and process.poll() is not None:
        _silent.pop(device, None)
        return False
    return process is not None


def _ask(command: Sequence[str], device: str) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [*command, device],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
    except OSError as error:
        raise StartFailed(
            f"losetup cannot be run: {error.strerror}", "Debian has it in the package mount"
        ) from error


def parse_answer(device: str, answer: bytes) -> Iterator[LoopFile]:
    """Nothing of one that has gone meanwhile."""
    try:
        for entry in json.loads(answer)["loopdevices"]:
            major, minor = str(entry["back-maj:min"]).split(":")
            number = os.makedev(int(major), int(minor))
            readonly = str(entry["ro"]).lower() in ("true", "1")
            yield LoopFile(device, f"file:{number}:{int(entry['back-ino'])}", readonly)
    except (ValueError, KeyError, TypeError):
        return
