"""The images directory: private build directories, published versions, the `current` link. Called by build
and by the command line; never touches what is inside an image.

    DIR/.lock                    held for moments only: while a build directory appears, goes or is published
    DIR/.build-*/lock            held by its builder as long as that lives; free means stale
    DIR/NAME/VERSION/            never changed after it appeared; VERSION sorts by time
    DIR/NAME/current -> VERSION
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = ".build-"
CURRENT = "current"
MANIFEST = "manifest.json"
VERSION = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")


@dataclass(frozen=True)
class Version:
    name: str
    version: str
    path: Path
    current: bool
    size: int
    built: str


@contextlib.contextmanager
def hold_store(images: Path) -> Iterator[None]:
    try:
        images.mkdir(mode=0o755, parents=True, exist_ok=True)
        file = (images / ".lock").open("w")
    except OSError as error:
        raise ImageError(f"{images} cannot be written: {error.strerror}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def private_build(images: Path) -> Iterator[Path]:
    """A fresh directory below `images` that is gone when the block ends, however it ends. After a kill -9
    it is the next builder's to remove: the kernel drops the lock with the process."""
    with hold_store(images):
        remove_stale(images)
        work = Path(tempfile.mkdtemp(prefix=PREFIX, dir=images))
        lock = (work / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield work
    finally:
        remove_tree(work)
        lock.close()


def clean_store(images: Path) -> list[str]:
    with hold_store(images):
        return remove_stale(images)


def remove_stale(images: Path) -> list[str]:
    """Removes build directories without a living builder; returns their names. The caller holds the
    store."""
    removed = []
    for work in sorted(images.glob(f"{PREFIX}*")):
        if not work.is_symlink() and work.is_dir() and not is_owned(work):
            remove_tree(work)
            removed.append(work.name)
    return removed


def is_owned(work: Path) -> bool:
    try:
        with (work / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def find_mounts(mountinfo: str, below: str) -> list[str]:
    """Mount points at or below `below`, the innermost first. `mountinfo` as in /proc/self/mountinfo."""
    points = []
    for line in mountinfo.splitlines():
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), line.split(" ")[4])
        if point == below or point.startswith(f"{below}/"):
            points.append(point)
    return points[::-1]


def remove_tree(work: Path) -> None:
    """Unmounts what is mounted inside, then deletes; a mount that stays is an error, never deleted into."""
    inside = str(work.resolve())
    for point in find_mounts(Path("/proc/self/mountinfo").read_text(), inside):
        subprocess.run(["umount", "--", point], check=False, capture_output=True, env={"PATH": os.defpath})
    left = find_mounts(Path("/proc/self/mountinfo").read_text(), inside)
    if left:
        raise ImageError(f"{left[0]} cannot be unmounted", "End what uses it, then run vmsilo-image clean.")
    # Children of a killed builder die with it, but a moment later; they may still be writing.
    for attempt in range(20):
        try:
            shutil.rmtree(work)
        except FileNotFoundError:
            if not work.exists():
                return
        except OSError as error:
            if attempt == 19:
                raise ImageError(f"{work} cannot be removed: {error.strerror}") from error
        else:
            return
        time.sleep(0.05)


def publish(images: Path, name: str, ready: Path, version: str) -> Path:
    """Makes the complete directory `ready` visible as NAME/VERSION, then current. Whoever looks sees either
    the old version or the new one, after a power cut too."""
    target = images / name / version
    try:
        sync_tree(ready)
        with hold_store(images):
            target.parent.mkdir(mode=0o755, exist_ok=True)
            ready.rename(target)
            sync(target.parent)
            switch_current(target.parent, version)
            sync(images)
    except OSError as error:
        raise ImageError(f"{target} cannot be published: {error.strerror}") from error
    return target


def switch_current(folder: Path, version: str) -> None:
    """Points `current` at `version` by one rename. A left-over of an interrupted switch is replaced."""
    staged = folder / f".{CURRENT}"
    staged.unlink(missing_ok=True)
    staged.symlink_to(version)
    staged.rename(folder / CURRENT)
    sync(folder)


def sync_tree(folder: Path) -> None:
    for child in folder.iterdir():
        sync(child)
    sync(folder)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_versions(images: Path) -> list[Version]:
    """All versions, by name, the newest first. A directory without a readable manifest is not a version."""
    found = []
    for folder in sorted(images.iterdir()) if images.is_dir() else []:
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        link = folder / CURRENT
        current = str(link.readlink()) if link.is_symlink() else None
        for path in sorted(folder.iterdir(), reverse=True):
            manifest = read_manifest(path) if VERSION.fullmatch(path.name) else None
            if manifest is None:
                continue
            size = sum(child.stat().st_size for child in path.iterdir())
            built = str(manifest.get("built", ""))
            found.append(Version(folder.name, path.name, path, path.name == current, size, built))
    return found


def read_manifest(path: Path) -> dict[str, object] | None:
    try:
        data = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def find_current(images: Path, name: str) -> Path:
    link = images / name / CURRENT
    if not link.is_symlink():
        raise ImageError(f"there is no image {name} in {images}", f"Build it: vmsilo image build {name}")
    path = images / name / link.readlink()
    if read_manifest(path) is None:
        raise ImageError(f"{path} has no readable {MANIFEST}", f"Build it again: vmsilo image build {name}")
    return path
