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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ImageError
from .versions import read_manifest, suggest_repair

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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
    with _opened(path, names) as files:
        if files.are_known(checked):
            return
        with _hashing:
            if not files.are_known(checked):
                files.read(checked)


def verify_version(path: Path, checked: Path = CHECKED_DIR) -> None:
    """As check_version, with every byte read whatever is remembered."""
    with _opened(path, None) as files, _hashing:
        files.read(checked)


@dataclass(frozen=True)
class _Files:
    """Files of one version, open, of the right size; `digests` is what the build said of each."""

    path: Path
    opened: dict[str, int]
    digests: dict[str, Any]

    def identities(self) -> dict[str, list[object]]:
        return {name: [*_identity(fd), self.digests[name]] for name, fd in self.opened.items()}

    def are_known(self, checked: Path) -> bool:
        known = _recall(self.path, checked)
        return all(known.get(name) == identity for name, identity in self.identities().items())

    def read(self, checked: Path) -> None:
        before = self.identities()
        for name, fd in self.opened.items():
            if hash_descriptor(fd) != self.digests[name]:
                fact = f"{self.path / name} is altered: its SHA-256 is not that of the build"
                raise ImageError(fact, _repair(self.path))
        if self.identities() == before:
            _remember(self.path, before, checked)


@contextmanager
def _opened(path: Path, names: Iterable[str] | None) -> Iterator[_Files]:
    try:
        for place in (path.parent.parent, path.parent, path, *sorted(path.iterdir())):
            check_owner(place)
        manifest = read_manifest(path) or {}
        digests, sizes = manifest.get("sha256"), manifest.get("sizes", {})
        if not isinstance(digests, dict) or not isinstance(sizes, dict):
            raise ImageError(f"{path} has no manifest with digests", _repair(path))
        with ExitStack() as stack:
            opened = {}
            for name in sorted(digests if names is None else names):
                opened[name] = _open(path, name)
                stack.callback(os.close, opened[name])
                _check_size(path / name, opened[name], sizes.get(name))
                if name not in digests:
                    raise ImageError(f"the manifest of {path} has no digest of {name}", _repair(path))
            yield _Files(path, opened, digests)
    except OSError as error:
        where = error.filename or path
        raise ImageError(f"{where} cannot be read: {error.strerror}", _repair(path)) from error


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


def _identity(fd: int) -> tuple[int, ...]:
    """What differs after any change of the file. No program can set ctime."""
    status = os.fstat(fd)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _memory_of(path: Path, checked: Path) -> Path:
    return checked / f"{path.parent.name}.{path.name}"


def _recall(path: Path, checked: Path) -> dict[str, Any]:
    try:
        known = json.loads(_memory_of(path, checked).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(path: Path, found: dict[str, list[object]], checked: Path) -> None:
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
    return suggest_repair(path.parent.parent, path.parent.name, path.name)
