"""Whether a version is whole: who may have written it, sizes, digests. Called by vmsilod before a start and
by the command line.

A digest is computed once per boot and file: what was found good is remembered in /run by the file's identity
(device, inode, size, and the times of its last change), which the kernel keeps. Raises an ImageError that
says which file is wrong and how.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ImageError
from .versions import read_manifest, suggest_repair

if TYPE_CHECKING:
    from collections.abc import Iterable

CHECKED_DIR = Path("/run/vmsilo/checked")
CHUNK = 1 << 20
_hashing = threading.Lock()  # twenty VMs that start at once read an image once


def check_owner(place: Path) -> None:
    """ImageError unless nobody but root, or whoever runs this, can have written it."""
    status = place.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise ImageError(f"{place} is a symbolic link", "vmsilo image list shows what there is")
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ImageError(
            f"{place} can be written by others than root (uid {status.st_uid},"
            f" mode {stat.S_IMODE(status.st_mode):04o})",
            f"find out who has written there; if nobody has: sudo chown root:root {place} &&"
            f" sudo chmod go-w {place}",
        )


def check_version(path: Path, names: Iterable[str] | None = None, checked: Path = CHECKED_DIR) -> None:
    """ImageError unless those files of the version (None: all of them) are as they were built."""
    _check(path, names, checked, fresh=False)


def verify_version(path: Path, checked: Path = CHECKED_DIR) -> None:
    """As check_version, with every byte read whatever is remembered."""
    _check(path, None, checked, fresh=True)


def _check(path: Path, names: Iterable[str] | None, checked: Path, *, fresh: bool) -> None:
    try:
        for place in (path.parent.parent, path.parent, path, *sorted(path.iterdir())):
            check_owner(place)
        manifest = read_manifest(path)
        digests = (manifest or {}).get("sha256")
        sizes = (manifest or {}).get("sizes", {})
        if not isinstance(digests, dict) or not isinstance(sizes, dict):
            raise ImageError(f"{path} has no manifest with digests", _repair(path))
        with ExitStack() as stack:
            opened = {}
            for name in sorted(digests if names is None else names):
                fd = _open(path, name)
                stack.callback(os.close, fd)
                _check_size(path / name, fd, sizes.get(name))
                if name not in digests:
                    raise ImageError(f"the manifest of {path} has no digest of {name}", _repair(path))
                opened[name] = fd
            _check_digests(path, opened, digests, None if fresh else checked)
            remember(path, {name: _identity(fd, digests[name]) for name, fd in opened.items()}, checked)
    except OSError as error:
        raise ImageError(
            f"{error.filename or path} cannot be read: {error.strerror}", _repair(path)
        ) from error


def _open(path: Path, name: str) -> int:
    fd = os.open(path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(f"{path / name} is not a file", _repair(path))
    return fd


def _check_size(file: Path, fd: int, expected: object) -> None:
    size = os.fstat(fd).st_size
    if expected is not None and size != expected:
        how = "truncated" if isinstance(expected, int) and size < expected else "altered"
        raise ImageError(f"{file} is {how}: {size} bytes, not {expected}", _repair(file.parent))


def _check_digests(
    path: Path, opened: dict[str, int], digests: dict[str, Any], checked: Path | None
) -> None:
    if checked is not None and _all_known(path, opened, digests, checked):
        return
    with _hashing:
        if checked is not None and _all_known(path, opened, digests, checked):
            return
        for name, fd in opened.items():
            before = _identity(fd, "")
            if hash_descriptor(fd) != digests[name] or _identity(fd, "") != before:
                raise ImageError(
                    f"{path / name} is altered: its SHA-256 is not that of the build", _repair(path)
                )


def _all_known(path: Path, opened: dict[str, int], digests: dict[str, Any], checked: Path) -> bool:
    known = _recall(path, checked)
    return all(known.get(name) == _identity(fd, digests[name]) for name, fd in opened.items())


def hash_descriptor(fd: int) -> str:
    """SHA-256 of the whole file; the descriptor's offset stays where it is."""
    total = hashlib.sha256()
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    offset = 0
    while count := os.preadv(fd, [buffer], offset):
        total.update(view[:count])
        offset += count
    return total.hexdigest()


def _identity(fd: int, digest: object) -> list[object]:
    """What differs after any change of the file. No program can set ctime."""
    status = os.fstat(fd)
    return [
        *(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns),
        digest,
    ]


def _memory_of(path: Path, checked: Path) -> Path:
    return checked / f"{path.parent.name}.{path.name}"


def _recall(path: Path, checked: Path) -> dict[str, Any]:
    try:
        known = json.loads(_memory_of(path, checked).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def remember(path: Path, found: dict[str, list[object]], checked: Path) -> None:
    """Only saves time: whatever cannot be written is not remembered."""
    known = _recall(path, checked)
    merged = {**known, **found}
    if merged == known:
        return
    target = _memory_of(path, checked)
    staged = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        checked.mkdir(mode=0o700, exist_ok=True)
        staged.write_text(json.dumps(merged))
        staged.rename(target)
    except OSError:
        return


def forget(path: Path, checked: Path = CHECKED_DIR) -> None:
    try:
        _memory_of(path, checked).unlink(missing_ok=True)
    except OSError:
        return


def _repair(path: Path) -> str:
    return suggest_repair(path.parent.parent, path.parent.name)
