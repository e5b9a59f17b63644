"""A VM's disks beside its root, as open descriptors: its overlay, its kept paths, and its additional_disks,
which are created on first use where the configuration says so.

Called in the worker by the preparation; the caller owns the descriptors. The overlay never has a name: it is
gone with the last process that holds it, however that ends. `lock_disks` and `check_formats` come after the
claims (vmsilod.disk_claims), which know the other VMs.
"""

from __future__ import annotations

import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmsilod.config.disks import PERSIST_SERIAL, AdditionalDisk, parse_size
from vmsilod.errors import StartFailed
from vmsilod.resources import filesystems, image, vhost_user
from vmsilod.resources.disk_format import Format, check_format
from vmsilod.resources.loop_devices import refuse_loop_device
from vmsilod.resources.paths import open_safely
from vmsilod.vmm.disks import CRYPT_SERIAL, OVERLAY_SERIAL

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmsilod.resources.vhost_user import Account

PLAIN_OVERLAY = (
    "what its guest writes to its root is on the host's disk as it is, since its image does not encrypt it; "
    "docs/disks.md says what helps"
)
OVERLAYS_DIR = Path("/var/lib/vmsilo/overlays")
PERSIST_DIR = Path("/var/lib/vmsilo/persist")


@dataclass(frozen=True)
class DiskRequest:
    """What a VM's configuration wants. `overlay_size` in bytes, None: the overlay is in its memory.
    `encrypted`: by its guest, which makes the overlay's file system, too.
    """

    overlay_size: int | None = None
    encrypted: bool = False
    persist_size: int | None = None
    additional: tuple[AdditionalDisk, ...] = ()


@dataclass(frozen=True)
class Vmm:
    """The account that the VMM runs as, `opens_as` as of preparation.Request; the guest's user."""

    uid: int
    gid: int
    opens_as: Account | None = None
    guest_uid: int = 1000


@dataclass(frozen=True)
class OpenDisk:
    """`fd` is the holder's to close. `title`: for people."""

    fd: int
    serial: str
    title: str
    readonly: bool = False
    format: Format = "raw"
    sparse: bool = True
    direct: bool = False
    lock: bool = True
    block_size: int = 512


def open_disks(name: str, wanted: DiskRequest, vmm: Vmm) -> Iterator[OpenDisk]:
    """One after the other, so that the caller keeps each before the next can fail."""
    if wanted.overlay_size is not None:
        yield make_overlay(wanted.overlay_size, vmm, encrypted=wanted.encrypted)
    if wanted.persist_size is not None:
        yield open_persist(name, wanted.persist_size, vmm)
    for disk in wanted.additional:
        yield open_additional(disk, vmm)


def make_overlay(
    size: int, vmm: Vmm, directory: Path = OVERLAYS_DIR, *, encrypted: bool = False
) -> OpenDisk:
    title = "the overlay of the root"
    filesystems.make_directory(directory)
    fd = filesystems.create_nameless(directory, size, title)
    try:
        if not encrypted:
            filesystems.make_ephemeral(fd, size, "overlay", title)
        _hand_over(fd, vmm, title)
    except BaseException:
        os.close(fd)
        raise
    return OpenDisk(fd, CRYPT_SERIAL if encrypted else OVERLAY_SERIAL, title, lock=False)


def find_persist(name: str, directory: Path = PERSIST_DIR) -> Path:
    return directory / f"{name}.img"


def has_plain_overlay(opened: Sequence[OpenDisk]) -> bool:
    return any(disk.serial == OVERLAY_SERIAL for disk in opened)


def open_persist(name: str, size: int, vmm: Vmm, directory: Path = PERSIST_DIR) -> OpenDisk:
    """Made when it is first needed; it grows when the configuration's size does, and never shrinks."""
    path = find_persist(name, directory)
    title = f"the disk of kept paths ({path})"
    filesystems.make_directory(directory)
    if not os.path.lexists(path):
        _create(path, size, filesystems.Ext4("persist"), title)
    fd = image.open_file(path, writable=True)
    try:
        filesystems.enlarge(fd, size, title)
        _hand_over(fd, vmm, title)
    except BaseException:
        os.close(fd)
        raise
    return OpenDisk(fd, PERSIST_SERIAL, title)


def open_additional(disk: AdditionalDisk, vmm: Vmm) -> OpenDisk:
    path = Path(disk.path)
    serial = disk.id or ""
    title = f"disk '{serial}' ({path})"
    if disk.create is not None and not os.path.lexists(path):
        create_additional(disk, vmm, title)
    fd = image.open_file(path, writable=not disk.ro)
    try:
        if stat.S_ISBLK(os.fstat(fd).st_mode):
            fd = _claim_block_device(fd, title, writable=not disk.ro)
        else:
            refuse_loop_device(fd, title, writable=not disk.ro)
        if disk.ro:
            refuse_writable(fd, title, vmm.gid)
        if vmm.opens_as is not None:
            vhost_user.require_disk_access(path, fd, vmm.opens_as, writable=not disk.ro)
    except BaseException:
        os.close(fd)
        raise
    options = {key: getattr(disk, key) for key in ("format", "sparse", "direct", "lock", "block_size")}
    return OpenDisk(fd, serial, title, readonly=disk.ro, **options)


def open_root(path: Path, gid: int, *, writable: bool, of_image: bool = False) -> int:
    """The root of a VM whose group is `gid`; `of_image`: a file that only vmsilo writes, whole."""
    title = f"the root disk ({path})"
    if of_image and writable:
        raise StartFailed(f"{path} belongs to all VMs of its image", "set root_disk to a copy of it")
    fd = image.open_file(path, writable=writable)
    try:
        if stat.S_ISBLK(os.fstat(fd).st_mode):
            fd = _claim_block_device(fd, title, writable=writable)
        elif not of_image:
            refuse_loop_device(fd, title, writable=writable)
        if not writable:
            refuse_writable(fd, title, gid)
    except BaseException:
        os.close(fd)
        raise
    return fd


def refuse_writable(fd: int, title: str, gid: int) -> None:
    """A descriptor for reading is no more than that only where the mode is, too: whoever has it can open the
    file once more by /proc/self/fd, through this mount and past every directory.
    """
    status = os.fstat(fd)
    if status.st_mode & 0o002 or (status.st_gid == gid and status.st_mode & 0o020):
        raise StartFailed(
            f"{title} is to be read-only, and its mode {stat.S_IMODE(status.st_mode):04o} lets the VM write",
            "chmod o-w; a disk that cloud-hypervisor writes can be given to no other VM",
        )


def create_additional(disk: AdditionalDisk, vmm: Vmm, title: str) -> None:
    """The file belongs to whom its directory belongs to: else the way to it would not be safe."""
    assert disk.create is not None
    size = parse_size(disk.create.size)
    plan = None
    if disk.create.filesystem == "ext4":
        plan = filesystems.Ext4((disk.id or "")[:16], owner=(vmm.guest_uid, vmm.guest_uid))
    _create(Path(disk.path), size, plan, title, whole=not disk.sparse, by_others=vmm.opens_as is not None)


def _create(
    path: Path,
    size: int,
    plan: filesystems.Ext4 | None,
    title: str,
    *,
    whole: bool = False,
    by_others: bool = False,
) -> None:
    directory = open_safely(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fd = filesystems.create_nameless(directory, size, title)
        try:
            if whole:
                filesystems.allocate(fd, size, title)
            if plan is not None:
                filesystems.make_ext4(fd, plan, title)
            place = os.fstat(directory)
            os.fchown(fd, place.st_uid, place.st_gid)
            if by_others and stat.S_IMODE(place.st_mode) & 0o077 == 0:
                # A VMM that opens its disks by itself; the directory keeps all others out.
                os.fchmod(fd, 0o666)
            filesystems.publish(fd, directory, path.name, title)
        except OSError as error:
            raise StartFailed(f"cannot make {title}: {error.strerror}") from error
        finally:
            os.close(fd)
    finally:
        os.close(directory)


def _hand_over(fd: int, vmm: Vmm, title: str) -> None:
    """A VMM may open it once more, by /proc/self/fd; nobody else has a way to it."""
    try:
        os.fchown(fd, vmm.uid, vmm.gid)
    except OSError as error:
        raise StartFailed(f"cannot give {title} to the VM: {error.strerror}") from error


def _claim_block_device(fd: int, title: str, *, writable: bool) -> int:
    """The descriptor in exchange for an exclusive one; a reader only asks whether the host uses the device.

    O_EXCL: the kernel refuses what is mounted, part of an array, or open like this (open(2)).
    """
    access = os.O_RDWR if writable else os.O_RDONLY
    try:
        exclusive = os.open(f"/proc/self/fd/{fd}", access | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        raise StartFailed(
            f"cannot open {title} alone: {error.strerror}",
            "is it mounted on the host, swap, part of a volume group, or in use by another VM?",
        ) from error
    if not writable:
        os.close(exclusive)
        return fd
    os.close(fd)
    return exclusive


def lock_disks(disks: Sequence[OpenDisk]) -> None:
    """flock(2): it belongs to the open file, so it lasts until the VMM, which has that, is gone."""
    for disk in disks:
        if disk.lock:
            lock_file(disk.fd, disk.title, writable=not disk.readonly)


def lock_file(fd: int, title: str, *, writable: bool) -> None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if writable else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StartFailed(
            f"{title} is locked by another program of the host",
            "lslocks tells which; lock = false of additional_disks ignores it",
        ) from error
    except OSError as error:
        raise StartFailed(f"cannot lock {title}: {error.strerror}") from error


def set_direct(disks: Sequence[OpenDisk]) -> None:
    """O_DIRECT, which QEMU wants on the descriptor; after the look at what it begins with, which goes
    through the host's cache.
    """
    for disk in disks:
        if disk.direct:
            try:
                fcntl.fcntl(disk.fd, fcntl.F_SETFL, fcntl.fcntl(disk.fd, fcntl.F_GETFL) | os.O_DIRECT)
            except OSError as error:
                raise StartFailed(
                    f"{disk.title} cannot bypass the host's cache: {error.strerror}", "direct = false"
                ) from error


def check_formats(disks: Sequence[OpenDisk], root_fd: int) -> None:
    check_format(root_fd, "raw", "the root disk")
    for disk in disks:
        check_format(disk.fd, disk.format, disk.title)
