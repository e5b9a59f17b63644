"""Makes a shared home: a copy of the template under another name, renamed when it is whole.

Runs with the rights of the user whose home it will be. Links are copied as links and never followed; what is
no file, directory or link is left out, and so is what a mode says beyond rwx. An interrupted copy leaves
nothing that counts: its name is never the home's, and the next one removes it.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
DEEPEST = 64
CHUNK = 1 << 20


class HomeError(Exception):
    """A fact for the journal and for whoever started the VM."""


def make_home(path: str, template: str) -> None:
    """Nothing to do where there is one already."""
    parent, _, name = path.rstrip("/").rpartition("/")
    partial = f".{name}.vmsilo-new"
    with ExitStack() as stack:
        try:
            place = os.open(parent or "/", DIRECTORY)
        except OSError as error:
            raise HomeError(f"cannot open {parent or '/'}: {error.strerror}") from error
        stack.callback(os.close, place)
        try:
            if _exists(name, place):
                return
            _remove(partial, place)
            os.mkdir(partial, 0o700, dir_fd=place)
            target = os.open(partial, DIRECTORY, dir_fd=place)
            stack.callback(os.close, target)
            source = _open_template(template)
            if source is not None:
                stack.callback(os.close, source)
                _copy_tree(source, target, 0)
            os.fsync(target)
            os.rename(partial, name, src_dir_fd=place, dst_dir_fd=place)
            os.fsync(place)
        except OSError as error:
            _remove_quietly(partial, place)
            where = f" ({error.filename})" if isinstance(error.filename, str) else ""
            raise HomeError(f"cannot make {path} from {template}: {error.strerror}{where}") from error


def _exists(name: str, place: int) -> bool:
    try:
        os.stat(name, dir_fd=place, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _open_template(template: str) -> int | None:
    """None where there is none: the home is empty then."""
    try:
        return os.open(template, DIRECTORY)
    except FileNotFoundError:
        return None


def _copy_tree(source: int, target: int, depth: int) -> None:
    if depth > DEEPEST:
        raise OSError(0, "the template is too deep")
    with os.scandir(source) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
            os.utime(name, ns=_times(status), dir_fd=target, follow_symlinks=False)
        elif stat.S_ISDIR(status.st_mode):
            _copy_directory(name, source, target, status, depth)
        elif stat.S_ISREG(status.st_mode):
            _copy_file(name, source, target, status)


def _copy_directory(name: str, source: int, target: int, status: os.stat_result, depth: int) -> None:
    os.mkdir(name, 0o700, dir_fd=target)
    inner = os.open(name, DIRECTORY, dir_fd=source)
    try:
        made = os.open(name, DIRECTORY, dir_fd=target)
        try:
            _copy_tree(inner, made, depth + 1)
            os.fchmod(made, status.st_mode & 0o777)
            os.utime(made, ns=_times(status))
            os.fsync(made)
        finally:
            os.close(made)
    finally:
        os.close(inner)


def _copy_file(name: str, source: int, target: int, status: os.stat_result) -> None:
    # Not blocking, for what has become a pipe meanwhile.
    original = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        copy = os.open(name, flags, 0o600, dir_fd=target)
        try:
            while chunk := os.read(original, CHUNK):
                view = memoryview(chunk)
                while view:
                    view = view[os.write(copy, view) :]
            os.fchmod(copy, status.st_mode & 0o777)
            os.utime(copy, ns=_times(status))
            # Before the rename is on disk the contents have to be.
            os.fsync(copy)
        finally:
            os.close(copy)
    finally:
        os.close(original)


def _times(status: os.stat_result) -> tuple[int, int]:
    return status.st_atime_ns, status.st_mtime_ns


def _remove(name: str, place: int) -> None:
    """What an interrupted copy left."""
    try:
        status = os.stat(name, dir_fd=place, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(name, dir_fd=place)
        return
    inner = os.open(name, DIRECTORY, dir_fd=place)
    try:
        os.fchmod(inner, 0o700)
        with os.scandir(inner) as entries:
            names = [entry.name for entry in entries]
        for entry_name in names:
            _remove(entry_name, inner)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=place)


def _remove_quietly(name: str, place: int) -> None:
    try:
        _remove(name, place)
    except OSError:
        return  # the next one tries again
