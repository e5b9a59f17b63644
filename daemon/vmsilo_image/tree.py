"""Paths and files inside a guest's root directory. Called by rootfs and initrd; never follows a symbolic
link of the guest out of that directory, whatever its packages have put there.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from .errors import ImageError

if TYPE_CHECKING:
    from pathlib import Path

# The kernel's own limit on links in one lookup.
MAX_LINKS = 40


def resolve_inside(root: Path, path: str) -> Path:
    """Where `path` of the guest is on the host, symbolic links read as the guest would read them."""
    todo = [part for part in reversed(path.split("/")) if part not in ("", ".")]
    here = root
    links = 0
    while todo:
        part = todo.pop()
        if part == "..":
            here = here.parent if here != root else root
            continue
        step = here / part
        if step.is_symlink():
            links += 1
            if links > MAX_LINKS:
                raise ImageError(f"{path} in the image has too many symbolic links")
            target = str(step.readlink())
            if target.startswith("/"):
                here = root
            todo.extend(piece for piece in reversed(target.split("/")) if piece not in ("", "."))
            continue
        here = step
    return here


def write_file(
    root: Path, path: str, data: bytes, mode: int = 0o644, owner: tuple[int, int] = (0, 0)
) -> None:
    """Replaces `path`; a symbolic link at its end is replaced too, not followed. Missing parents are root's
    0755."""
    parent, _, name = path.rpartition("/")
    folder = resolve_inside(root, parent)
    make_folders(root, folder)
    target = folder / name
    try:
        target.unlink(missing_ok=True)
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            os.fchown(descriptor, *owner)
            os.fchmod(descriptor, mode)
    except OSError as error:
        raise ImageError(f"{path} cannot be written into the image: {error.strerror}") from error


def write_link(root: Path, path: str, target: str) -> None:
    parent, _, name = path.rpartition("/")
    folder = resolve_inside(root, parent)
    make_folders(root, folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


def make_folders(root: Path, folder: Path) -> None:
    missing = []
    while folder != root and not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir()
        each.chmod(0o755)


def empty_folder(root: Path, path: str) -> None:
    """Removes what is in `path`, keeps `path`; one that is not there is left so."""
    folder = resolve_inside(root, path)
    if not folder.is_dir():
        return
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def find_ids(root: Path, owner: str) -> tuple[int, int]:
    """`USER` or `USER:GROUP` by the guest's own passwd and group."""
    user, colon, group = owner.partition(":")
    passwd = _rows(root, "/etc/passwd")
    if user not in passwd:
        raise ImageError(f"the image has no user {user}")
    uid, gid = int(passwd[user][2]), int(passwd[user][3])
    if colon:
        groups = _rows(root, "/etc/group")
        if group not in groups:
            raise ImageError(f"the image has no group {group}")
        gid = int(groups[group][2])
    return uid, gid


def _rows(root: Path, path: str) -> dict[str, list[str]]:
    lines = resolve_inside(root, path).read_text().splitlines()
    return {line.split(":")[0]: line.split(":") for line in lines if line.count(":") >= 3}
