"""A file of vmsilod's state: JSON, replaced as a whole, readable by root alone.

Called by whoever keeps one, in the worker. A reader sees the old content or the new one, after a kill at any
moment too; what a kill leaves beside it, `temporary_of` it, is replaced by the next writer.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from vmsilod.errors import Failed

if TYPE_CHECKING:
    from pathlib import Path


def temporary_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def save_json(path: Path, content: object) -> None:
    """Raises Failed. Makes the directory where it is missing."""
    temporary = temporary_of(path)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w") as file:  # noqa: PTH123 - a descriptor, not a path
            json.dump(content, file)
        temporary.rename(path)
    except OSError as error:
        raise Failed(f"cannot write {path}: {error.strerror}") from error
