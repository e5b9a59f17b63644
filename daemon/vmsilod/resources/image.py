"""What a VM boots from: the current version of its image, or the files its configuration names, as open
descriptors.

Called in the worker by the lifecycle. Descriptors are opened by root and handed to the VMM, so the VMM's uid
needs no access to any path. The initrd that a VMM gets is a sealed memory file: the image's initrd with the
per-boot secret behind.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsilo_image.cpio import SshKeys, check_login, secret_archive
from vmsilo_image.versions import suggest_repair

from vmsilod.errors import StartFailed
from vmsilod.resources.paths import open_safely

if TYPE_CHECKING:
    from collections.abc import Mapping

IMAGES_DIR = Path("/var/lib/vmsilo/images")
COPY_CHUNK = 1 << 24
PMEM_ALIGNMENT = 2 << 20  # bytes; of a huge page, in which virtio-pmem is mapped


@dataclass(frozen=True)
class BootFiles:
    """Paths; `initrd` may be None only with a custom kernel."""

    kernel: Path
    initrd: Path | None
    root: Path
    version: str
    pmem: bool = False
    """The image says that its root may be persistent memory: its initrd has the driver for that."""
    login: str = "user"  # the guest's user, as the image's manifest says
    folder: Path | None = None  # of the version, where anything is of the image
    uid: int = 1000  # and their number
    disks: bool = False
    """Its initrd is the image's, which says that it finds overlay and kept paths on disks."""
    crypt: bool = False
    """And that it encrypts the overlay."""


@dataclass(frozen=True)
class BootChoice:
    """What the configuration says: None means "from the image"."""

    image: str
    kernel: str | None = None
    initramfs: str | None = None
    root_disk: str | None = None
    version: str | None = None
    """Of the image; None: the current one."""


def find_boot_files(choice: BootChoice, images: Path = IMAGES_DIR) -> BootFiles:
    """Raises StartFailed where there is none. `current` is read once, so that one answer has one version."""
    needs_image = not (choice.kernel and choice.root_disk)
    base = Path()
    manifest: dict[str, Any] = {}
    login, uid = "user", 1000
    if needs_image:
        link = images / choice.image / (choice.version or "current")
        try:
            base = link.resolve(strict=True)
            manifest = json.loads((base / "manifest.json").read_text())
            login = check_login(manifest.get("user", login))
            uid = int(manifest.get("uid", uid))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise StartFailed(
                f"image '{choice.image}' has no usable current version in {images}",
                suggest_repair(images, choice.image),
            ) from error
    own_kernel = choice.kernel is not None
    all_of_image = not (choice.kernel or choice.initramfs or choice.root_disk)
    initrd = Path(choice.initramfs) if choice.initramfs else (None if own_kernel else base / "initrd")
    disks = not (own_kernel or choice.initramfs) and manifest.get("disks") is True
    return BootFiles(
        kernel=Path(choice.kernel) if choice.kernel else base / "vmlinuz",
        initrd=initrd,
        root=Path(choice.root_disk) if choice.root_disk else base / "root.erofs",
        version=base.name if needs_image else "custom",
        pmem=all_of_image and manifest.get("pmem") is True,
        login=login,
        folder=base if needs_image else None,
        uid=uid,
        disks=disks,
        crypt=disks and choice.root_disk is None and manifest.get("crypt") is True,
    )


def pin_version(choice: BootChoice, images: Path = IMAGES_DIR) -> BootChoice:
    """With the version that is current now, so that a switch during a start cannot mix two versions. Raises
    StartFailed where there is none.
    """
    files = find_boot_files(choice, images)
    return choice if files.folder is None else replace(choice, version=files.version)


def is_pmem(files: BootFiles, root_fd: int) -> bool:
    """Whether the root can be given to a guest as persistent memory."""
    status = os.fstat(root_fd)
    return files.pmem and stat.S_ISREG(status.st_mode) and status.st_size % PMEM_ALIGNMENT == 0


def open_file(path: Path, *, writable: bool = False) -> int:
    """Open a regular file or block device; the caller owns the descriptor."""
    access = os.O_RDWR if writable else os.O_RDONLY
    fd = open_safely(path, access | os.O_NOCTTY | os.O_NONBLOCK)
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(fd)
        raise StartFailed(f"{path} is neither a file nor a block device")
    os.set_blocking(fd, True)
    return fd


def make_initrd(
    initrd: Path | None,
    secret: str,
    ssh: SshKeys | None = None,
    directory: Path | None = None,
    network: Mapping[str, str] | None = None,
) -> int:
    """A sealed memory file: the initrd, padded to 4 bytes, and behind it a cpio archive that holds only the
    secret, the ssh keys and the configuration of the guest's network.

    The kernel unpacks concatenated archives one after the other
    (Documentation/driver-api/early-userspace/buffer-format). A command line would show the secret: argv to
    every user of the host, /proc/cmdline to every user of the guest.

    With `directory`, which has to be on a tmpfs, a nameless file there instead, which nobody but its holders
    can open: Landlock rules cannot name a memory file.
    """
    if directory is None:
        target = os.memfd_create("vmsilo-initrd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        target = _create_nameless(directory)
    try:
        size = _copy(initrd, target) if initrd is not None else 0
        os.pwrite(target, b"\0" * (-size % 4) + secret_archive(secret, ssh, network), size)
        if directory is None:
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(target, fcntl.F_ADD_SEALS, seals)
        # Every open of a memory file is checked against its mode: the VMM's uid opens it again by
        # /proc/self/fd.
        os.fchmod(target, 0o444)
        if directory is None:
            return target
        # The VMM gets it for reading only: by the mode, and by this descriptor.
        readable = os.open(f"/proc/self/fd/{target}", os.O_RDONLY | os.O_CLOEXEC)
    except BaseException:
        os.close(target)
        raise
    os.close(target)
    return readable


def _create_nameless(directory: Path) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartFailed(f"cannot make a file in {directory}: {error.strerror}") from error


def _copy(source: Path, target: int) -> int:
    fd = open_file(source)
    try:
        size = 0
        while sent := os.sendfile(target, fd, size, COPY_CHUNK):
            size += sent
    except OSError as error:
        raise StartFailed(f"cannot read {source}: {error.strerror}") from error
    finally:
        os.close(fd)
    return size
