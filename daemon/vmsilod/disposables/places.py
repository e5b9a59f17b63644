"""Which directory of a caller's may become one of a disposable, and as what share.

The caller has opened it, and names the path that systemd will mount it by: both must be the same directory,
by a way that only root and he can change. He must own it; what else he may not do there, its virtiofsd,
which runs with his rights, may not either. Called by the keeper, in the worker.
"""

from __future__ import annotations

import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from vmsilod.config.shares import SharedDirectory
from vmsilod.errors import BadRequest, Denied
from vmsilod.resources import shares

if TYPE_CHECKING:
    from vmsilod.bus.requests import Shared

TAG = "here"


@dataclass(frozen=True)
class Here:
    """`inode`: device and inode of what the caller has opened. By the time of the start the path may lead to
    another directory of his, if others can rename things on the way.
    """

    share: SharedDirectory
    inode: tuple[int, int]


def accept_directory(shared: Shared, owner: int) -> Here:
    """Blocks. Raises a VmsiloError that says in a line why not."""
    path = shared.path
    status = os.fstat(shared.fd)
    if not stat.S_ISDIR(status.st_mode):
        raise BadRequest(f"'{path}' is no directory")
    try:
        share = SharedDirectory.model_validate(
            {"path": path, "mount": path, "tag": TAG, "readonly": shared.readonly}
        )
    except ValidationError as error:
        fact = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise BadRequest(fact, "go to another directory") from error
    if share.path != path:
        raise BadRequest(f"'{path}' is not the plain path of a directory")
    if status.st_uid != owner:
        raise Denied(f"'{path}' belongs to uid {status.st_uid}, not to you", "go to a directory of your own")
    inode = (status.st_dev, status.st_ino)
    _refuse_home(Path(path), inode, Path(pwd.getpwuid(owner).pw_dir), allowed=shared.home)
    fd = shares.open_directory(Path(path), {owner})
    try:
        if not shares.is_same(fd, shared.fd):
            raise BadRequest(f"'{path}' is not the directory that was opened", "cd there anew")
    finally:
        os.close(fd)
    return Here(share, inode)


def _refuse_home(path: Path, inode: tuple[int, int], home: Path, *, allowed: bool) -> None:
    """By inode too: links and bind mounts give a directory several paths, and passwd says one of them."""
    real = Path(os.path.realpath(home))
    if path in (home, real) or inode == _find_inode(real):
        if allowed:
            return
        raise BadRequest(
            f"'{path}' is all of your home directory",
            "go to a directory in it; --allow-home shares it all the same",
        )
    above = {*home.parents, *real.parents}
    if path in above or inode in {_find_inode(place) for place in above}:
        raise BadRequest(f"'{path}' holds your home directory")


def _find_inode(path: Path) -> tuple[int, int] | None:
    """None for what is not there, or not for root (a home by FUSE): then the path has to do."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
