"""New files with an ext4 in them, by mke2fs(8) over an open descriptor: it never sees a path of ours.

Called in the worker by the overlay, the kept paths and disks that are created on first use. A file has no
name before it is whole, so whatever ends this half-way leaves nothing.
"""

from __future__ import annotations

import errno
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vmsilod.errors import Failed, StartFailed, VmsiloError

MKFS = "/sbin/mke2fs"
MKFS_SECONDS = 60
# Nothing is written that a mount makes up for: inode tables stay holes. nodiscard: the file is all hole.
_QUICK = "lazy_itable_init=1,nodiscard"
# Every feature by name, so that a host's newer mke2fs makes nothing that an older guest cannot mount.
_FEATURES = (
    "none,extent,flex_bg,dir_index,filetype,ext_attr,large_file,huge_file,dir_nlink,extra_isize"
    ",64bit,metadata_csum"
)
_LASTING_EXTENDED = ",lazy_journal_init=1"
_LASTING = ("-O", f"{_FEATURES},has_journal,resize_inode,sparse_super")
# A file system that nobody ever mounts twice needs no journal, no room to grow, no second superblock; with
# its tables in one place it costs a handful of blocks (120 KiB of a file of 10 GiB).
_EPHEMERAL = ("-O", f"{_FEATURES},sparse_super2", "-m", "0")
_EPHEMERAL_EXTENDED = ",num_backup_sb=0,packed_meta_blocks=1"

# What mke2fs writes of an ephemeral one, by size and label; as long as the process.
_TEMPLATES: dict[tuple[int, str], tuple[tuple[int, bytes], ...]] = {}
TEMPLATES_MAX = 16
TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True)
class Ext4:
    """`owner` owns its top directory. `ephemeral`: for one boot."""

    label: str
    owner: tuple[int, int] = (0, 0)
    ephemeral: bool = False


def create_nameless(directory: Path | int, size: int, title: str) -> int:
    """A sparse file of mode 0600 without a name, on the file system of `directory`."""
    place = directory if isinstance(directory, Path) else f"/proc/self/fd/{directory}"
    try:
        fd = os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):
            raise StartFailed(
                f"cannot make {title}: its file system has no files without a name (O_TMPFILE)",
                "ext4, xfs, btrfs and tmpfs have them",
            ) from error
        raise _translate(error, title) from error
    try:
        os.fchmod(fd, 0o600)
        os.truncate(fd, size)
    except OSError as error:
        os.close(fd)
        raise _translate(error, title) from error
    return fd


def make_ext4(fd: int, plan: Ext4, title: str) -> None:
    """Format the file, whose size is set."""
    uid, gid = plan.owner
    extended = f"{_QUICK},root_owner={uid}:{gid}" + (
        _EPHEMERAL_EXTENDED if plan.ephemeral else _LASTING_EXTENDED
    )
    argv = [MKFS, "-t", "ext4", "-q", "-F", "-b", "4096", "-I", "256", "-L", plan.label]
    argv += [*(_EPHEMERAL if plan.ephemeral else _LASTING), "-E", extended, "--", f"/proc/self/fd/{fd}"]
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=env,
            pass_fds=[fd],
            timeout=MKFS_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise StartFailed(f"cannot format {title}: {MKFS} is missing", "install e2fsprogs") from error
    except subprocess.TimeoutExpired as error:
        raise StartFailed(f"cannot format {title}: mke2fs did not end in {MKFS_SECONDS} s") from error
    if done.returncode:
        reason = done.stderr[-300:].decode(errors="replace").strip().replace("\n", " ")
        raise StartFailed(f"cannot format {title}: {reason}", "is the disk full?")


def make_ephemeral(fd: int, size: int, label: str, title: str) -> None:
    """As make_ext4 of an ephemeral one. From the second of a size on, what mke2fs wrote is copied: 0.1 ms
    and no process instead of 10 ms.
    """
    known = _TEMPLATES.get((size, label))
    if known is None:
        make_ext4(fd, Ext4(label, ephemeral=True), title)
        written = _read_data(fd)
        if written and len(_TEMPLATES) < TEMPLATES_MAX:
            _TEMPLATES[size, label] = written
        return
    try:
        for offset, data in known:
            os.pwrite(fd, data, offset)
    except OSError as error:
        raise _translate(error, title) from error


def _read_data(fd: int) -> tuple[tuple[int, bytes], ...]:
    """What is not hole, by offset; nothing where the file system does not tell, or that is too much."""
    found: list[tuple[int, bytes]] = []
    place, total = 0, 0
    while True:
        try:
            start = os.lseek(fd, place, os.SEEK_DATA)
            place = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            return tuple(found) if error.errno == errno.ENXIO else ()
        total += place - start
        if total > TEMPLATE_BYTES:
            return ()
        found.append((start, os.pread(fd, place - start, start)))


def publish(fd: int, directory: int, name: str, title: str) -> None:
    """Give the whole file its name in the open `directory`. Where there is one already, StartFailed."""
    try:
        os.fsync(fd)
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory, follow_symlinks=True)
        os.fsync(directory)
    except OSError as error:
        raise _translate(error, title) from error


def allocate(fd: int, size: int, title: str) -> None:
    """Take all of the blocks now."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        raise _translate(error, title) from error


def enlarge(fd: int, size: int, title: str) -> bool:
    """A sparse file grows to `size`; one that is as large stays. Says whether it grew."""
    try:
        if os.fstat(fd).st_size >= size:
            return False
        os.truncate(fd, size)
        os.fsync(fd)
    except OSError as error:
        raise _translate(error, title) from error
    return True


def make_directory(path: Path) -> None:
    """One that only root enters."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise Failed(f"cannot create {path}: {error.strerror}") from error


def _translate(error: OSError, title: str) -> VmsiloError:
    hint = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "make room on its file system, or give it a smaller size"
    if error.errno == errno.EROFS:
        hint = "vmsilod may not write there: below /usr, /boot and /etc it keeps no disks"
    return StartFailed(f"cannot make {title}: {error.strerror}", hint)
