"""Opens a path from the configuration as root without being led elsewhere by a user who owns a part of it.

Called for kernels, initramfs and disks, which may be below /home. A file, a directory or a link that belongs
to a user may lead only to things of that same user: else whoever owns it chooses what root opens. (systemd
calls this CHASE_SAFE.) The walk holds descriptors, so that nothing can be exchanged behind it.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path

from vmsilod.errors import StartFailed

MAX_LINKS = 40  # as the kernel's MAXSYMLINKS
WALK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def open_safely(path: Path, flags: int) -> int:
    """Open an absolute path; the caller owns the descriptor. StartFailed says which step is not safe."""
    parts = list(reversed(path.parts[1:]))
    links = 0
    with ExitStack() as stack:
        place = os.open("/", WALK | os.O_DIRECTORY)
        stack.callback(os.close, place)
        root, owner = place, 0
        while parts:
            name = parts.pop()
            try:
                step = os.open(name, WALK, dir_fd=place)
            except OSError as error:
                raise StartFailed(f"cannot open {path}: {error.strerror} ({name})") from error
            stack.callback(os.close, step)
            status = os.fstat(step)
            if owner not in (0, status.st_uid):
                raise StartFailed(
                    f"{path}: what belongs to uid {owner} leads to {name} of uid {status.st_uid}",
                    "put it where only root or its owner can change the way to it",
                )
            owner = status.st_uid
            if not stat.S_ISLNK(status.st_mode):
                place = step
                continue
            links += 1
            if links > MAX_LINKS:
                raise StartFailed(f"cannot open {path}: too many symbolic links")
            target = Path(os.readlink("", dir_fd=step))
            if target.is_absolute():
                place = root
            parts.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
        try:
            return os.open(f"/proc/self/fd/{place}", flags | os.O_CLOEXEC)
        except OSError as error:
            raise StartFailed(f"cannot open {path}: {error.strerror}") from error
