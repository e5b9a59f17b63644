"""The images directory: private build directories, published versions, the links to them. Called by build
and by the command line; never touches what is inside an image.

    DIR/.lock                    held for moments only: while something appears, goes or is switched
    DIR/.build-*/lock            held by its builder as long as that lives; free means stale
    DIR/.gone-*                  a version, or a stale build, that is being deleted; anybody goes on with it
    DIR/NAME/VERSION/            never changed after it appeared; VERSION sorts by time
    DIR/NAME/current -> VERSION  what VMs start from
    DIR/NAME/previous -> VERSION what was current before
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = ".build-"
GONE = ".gone-"
CURRENT = "current"
PREVIOUS = "previous"
MANIFEST = "manifest.json"
VERSION = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")


@contextlib.contextmanager
def hold_store(images: Path) -> Iterator[None]:
    try:
        images.mkdir(mode=0o755, parents=True, exist_ok=True)
        # Nobody else may open it: flock(2) needs no right to write, and who holds it holds up all others.
        file = os.fdopen(os.open(images / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "w")
        os.fchmod(file.fileno(), 0o600)
    except OSError as error:
        raise ImageError(f"{images} cannot be written: {error.strerror}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def private_build(images: Path) -> Iterator[Path]:
    """A fresh directory below `images` that is gone when the block ends, however it ends. After a kill -9
    it is the next builder's to remove: the kernel drops the lock with the process."""
    remove_leftovers(images)
    with hold_store(images):
        work = Path(tempfile.mkdtemp(prefix=PREFIX, dir=images))
        lock = (work / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield work
    finally:
        remove_tree(work)
        lock.close()


def remove_leftovers(images: Path) -> list[str]:
    """Deletes what was set aside, and build directories without a living builder; returns their names."""
    if not images.is_dir():
        return []
    removed = []
    with hold_store(images):
        for work in sorted(images.glob(f"{PREFIX}*")):
            if not work.is_symlink() and work.is_dir() and not is_owned(work):
                set_aside(images, work)
                removed.append(work.name)
        for link in (*images.glob(f"*/.{CURRENT}"), *images.glob(f"*/.{PREVIOUS}")):
            link.unlink()  # of a switch that was interrupted
        aside = sorted(images.glob(f"{GONE}*"))
    # A large tree takes its time, in which others may have the store.
    for folder in aside:
        remove_tree(folder)
        if not folder.name.startswith(f"{GONE}{PREFIX}"):
            removed.append(folder.name)
    return removed


def set_aside(images: Path, folder: Path) -> Path:
    """By one rename out of everybody's sight; whoever is interrupted before it is deleted leaves it to
    remove_leftovers(). The caller holds the store."""
    target = images / f"{GONE}{folder.name}-{secrets.token_hex(4)}"
    try:
        folder.rename(target)
        sync(folder.parent)
        sync(images)
    except OSError as error:
        raise ImageError(f"{folder} cannot be removed: {error.strerror}") from error
    return target


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
        raise ImageError(f"{left[0]} cannot be unmounted", "End what uses it, then run: vmsilo image gc")
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
            sync(images)
            ready.rename(target)
            sync(target.parent)
            switch_current(target.parent, version)
    except OSError as error:
        raise ImageError(f"{target} cannot be published: {error.strerror}") from error
    return target


def switch_current(folder: Path, version: str) -> None:
    """Points `current` at `version` by one rename, and before that `previous` at what was current. The
    caller holds the store."""
    old = read_link(folder / CURRENT)
    if old == version:
        return
    if old is not None:
        _point(folder / PREVIOUS, old)
    _point(folder / CURRENT, version)
    sync(folder)


def _point(link: Path, target: str) -> None:
    """A left-over of an interrupted switch is replaced."""
    staged = link.with_name(f".{link.name}")
    staged.unlink(missing_ok=True)
    staged.symlink_to(target)
    staged.rename(link)


def read_link(link: Path) -> str | None:
    try:
        return str(link.readlink())
    except OSError:
        return None


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
