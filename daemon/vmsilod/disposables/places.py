"""Which directory of a caller's may become one of a disposable, and as what share.

The caller has opened it, and names the path that systemd will mount it by: both must be the same directory,
by a way that only root and he can change. He must own it; what else he may not do there, its virtiofsd,
which runs with his rights, may not either. Called by the keeper, in the worker.
"""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from vmsilod.config.shares import SharedDirectory
from vmsilod.errors import BadRequest, Denied
from vmsilod.resources import shares

if TYPE_CHECKING:
    from vmsilod.bus.requests import Shared

TAG = "here"


def accept_directory(shared: Shared, owner: int) -> SharedDirectory:
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
    home = Path(pwd.getpwuid(owner).pw_dir)
    if home.is_relative_to(path) and not (shared.home and home == Path(path)):
        whole = Path(path) == home
        raise BadRequest(
            f"'{path}' is all of your home directory" if whole else f"'{path}' holds your home directory",
            "go to a directory in it; --allow-home shares it all the same" if whole else "",
        )
    fd = shares.open_directory(Path(path), {owner})
    try:
        if not shares.is_same(fd, shared.fd):
            raise BadRequest(f"'{path}' is not the directory that was opened", "cd there anew")
    finally:
        os.close(fd)
    return share
