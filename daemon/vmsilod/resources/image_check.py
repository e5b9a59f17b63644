"""Refuses a start from an image that is not as it was built: truncated, altered, or writable by others.

Called in the worker, before anything is opened for the VMM. A check is some `stat` calls; bytes are read
once per boot and version (vmsilo_image.integrity remembers what it found good).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsilo_image.errors import ImageError
from vmsilo_image.integrity import CHECKED_DIR, check_version

from vmsilod.errors import StartFailed

if TYPE_CHECKING:
    from pathlib import Path

    from vmsilod.resources.image import BootFiles


def require_whole(files: BootFiles, checked: Path = CHECKED_DIR) -> None:
    """StartFailed says which file is wrong and what to do. Of a file that the configuration names instead
    of the image's nothing is known."""
    if files.folder is None:
        return
    used = (files.kernel, files.initrd, files.root)
    names = [path.name for path in used if path is not None and path.parent == files.folder]
    try:
        check_version(files.folder, names, checked)
    except ImageError as error:
        raise StartFailed(error.fact, error.hint or "") from error
