"""Who uses a version: the VMs that vmsilod's records name, and whoever has one of its files open.

Called before something is removed. A record (/run/vmsilo/state/NAME.json) is written before a VM gets
anything and stays until vmsilod has seen its end, so it holds while vmsilod is down or starts anew. The
kernel is asked besides: it alone knows of a VMM whose record is gone, or that somebody runs by hand.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ImageError
from .tools import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

STATE_DIR = Path("/run/vmsilo/state")
OPENERS_NAMED = 3


@dataclass(frozen=True)
class Use:
    """A running VM. `version` is "" where its record, of an older vmsilod, does not say: then every version
    of the image counts as used."""

    vm: str
    image: str
    version: str

    def is_of(self, path: Path) -> bool:
        return self.image == path.parent.name and self.version in ("", path.name)


def load_uses(state: Path = STATE_DIR) -> list[Use]:
    """ImageError for a record that cannot be read: what it protects is not known."""
    uses = []
    try:
        for path in sorted(state.glob("*.json")) if state.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):  # that VM has just ended
                record = json.loads(path.read_text())
                config = json.loads(record["config"])
                uses.append(Use(path.stem, str(config["image"]), str(record.get("version", ""))))
    except OSError as error:
        raise ImageError(f"{error.filename or state} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ImageError(
            f"{path} is not a record of a VM, so nobody knows what that VM uses",
            "systemctl restart vmsilod.service sees to it",
        ) from error
    return uses


@contextlib.contextmanager
def unused(files: list[Path]) -> Iterator[None]:
    """While the block runs nobody has one of the files open; ImageError if somebody has.

    By leases (fcntl(2), F_SETLEASE): the kernel grants F_WRLCK only while there is no other open file of
    that inode, counts mappings too, and makes a later open wait, or fail with EWOULDBLOCK, until the lease
    goes. It goes with us, kill -9 included. Where the file system has no leases the records have to do.
    """
    # Sent when somebody wants to open it; the default action ends the process.
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    held: list[int] = []
    try:
        for path in files:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            held.append(fd)
            _take_lease(path, fd)
        yield
    except OSError as error:
        raise ImageError(f"{error.filename or files[0]} cannot be looked at: {error.strerror}") from error
    finally:
        for fd in held:
            os.close(fd)
        signal.signal(signal.SIGIO, before)


def _take_lease(path: Path, fd: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise ImageError(
                f"{path} is in use{describe_openers(fd)}", "Stop what uses it, or wait for its end."
            ) from error
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


def describe_openers(fd: int) -> str:
    """For people: the processes that have the file open, as far as /proc shows them."""
    wanted = os.fstat(fd)
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    status = link.stat()
                    if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
                        name = (process / "comm").read_text().strip()
                        found.append(f"{printable(name)}[{process.name}]")
                        break
    return f" by {', '.join(sorted(found)[:OPENERS_NAMED])}" if found else ""
