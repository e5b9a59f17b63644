"""The initrd of an image: busybox, guest/image/init and the few modules that stand between the kernel and
its root. Called by build; reads the root directory, writes nothing.

Neither the archive nor the modules in it are compressed: the host hands it over by a copy in memory, and
the guest saves the time of unpacking. All other modules stay in the root image for udev.
"""

from __future__ import annotations

import gzip
import lzma
import subprocess
from typing import TYPE_CHECKING

from . import cpio, modules
from .errors import ImageError
from .tree import resolve_inside

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# libcrc32c of a full Debian kernel, which erofs needs, does not load without the algorithm, and modules.dep
# does not say so.
FIRST_IF_THERE = ("crc32c_generic",)
# Order is load order: the transports come last, so that a device finds its driver when it appears.
WANTED = (
    "erofs",
    "ext4",
    "overlay",
    "virtio_blk",
    "virtio_console",
    "vsock",
    "vmw_vsock_virtio_transport",
    "virtio_rng",
    # The power button, by which a VMM asks for a clean end: trim leaves ACPI devices out of coldplug.
    "button",
    "virtio_pci",
    "virtio_mmio",
)
# The first two: how a VMM hears of a panic; without it a panic looks like a reset, and a broken guest boots
# for ever. The others: a root that is persistent memory.
PMEM = ("virtio_pmem", "nd_pmem")
WANTED_IF_THERE = ("pvpanic_mmio", "pvpanic_pci", *PMEM)
# Loaded by init only where the host names an interface.
NETWORK = ("virtio_net",)
# Loaded by init where the overlay is on a disk. AES: one of these, under its older or newer name, for a CPU
# without instructions for it. The last two: where the kernel has them apart.
CRYPT = ("xts", "dm_crypt")
AES = ("aes_generic", "aes")
CRYPT_IF_THERE = (*AES, "aesni_intel", "ecb")
CRYPT_PROGRAMS = ("/usr/sbin/dmsetup", "/usr/sbin/mke2fs")
"""What init runs from the root image, before it is anybody's root."""
APPLETS = (
    *("cat", "chown", "chroot", "cp", "cttyhack", "head", "insmod", "ip", "ln", "mkdir", "mount", "mv"),
    *("poweroff", "rm", "setsid", "sh", "switch_root", "sync", "umount", "usleep", "xxd"),
)
DIRECTORIES = ("bin", "dev", "modules", "new", "persist", "proc", "root", "rw", "sys")


def build_initrd(root: Path, release: str, init: bytes) -> bytes:
    """The whole archive, its length a multiple of 512, so that another may follow it as it is."""
    entries = [cpio.directory(name) for name in DIRECTORIES]
    # The kernel opens this before init could mount /dev.
    entries.append(cpio.character_device("dev/console", 0o600, (5, 1)))
    entries.append(cpio.regular("init", init, 0o755))
    entries.append(cpio.regular("bin/busybox", load_busybox(root), 0o755))
    entries.extend(cpio.symlink(f"bin/{applet}", "busybox") for applet in APPLETS)
    loaded = load_modules(root, release)
    network = [each for each in load_modules(root, release, (), NETWORK) if each not in loaded]
    crypt = []
    if has_crypt(root, release):
        crypt = [each for each in load_modules(root, release, CRYPT, CRYPT_IF_THERE) if each not in loaded]
    entries.extend(cpio.regular(f"modules/{name}", data) for name, data in (*loaded, *network, *crypt))
    for list_name, modules_of in (("list", loaded), ("network", network), ("crypt", crypt)):
        lines = "".join(f"{name}\n" for name, _ in modules_of)
        entries.append(cpio.regular(f"modules/{list_name}", lines.encode()))
    return cpio.pad(cpio.newc_archive(entries), 512)


def load_busybox(root: Path) -> bytes:
    for path in ("/bin/busybox", "/usr/sbin/busybox", "/sbin/busybox"):
        found = resolve_inside(root, path)
        if found.is_file():
            return found.read_bytes()
    raise ImageError("the image has no busybox", 'Add "busybox-static" to packages.')


def load_modules(
    root: Path, release: str, wanted: Sequence[str] = WANTED, if_there: Sequence[str] = WANTED_IF_THERE
) -> list[tuple[str, bytes]]:
    """(file name, uncompressed module), in load order."""
    base = resolve_inside(root, f"/lib/modules/{release}")
    try:
        dependencies = (base / "modules.dep").read_text()
        builtin = (base / "modules.builtin").read_text()
    except OSError as error:
        raise ImageError(f"the modules of kernel {release} cannot be read: {error.strerror}") from error
    order = modules.plan_load_order(wanted, dependencies, builtin, if_there, FIRST_IF_THERE)
    return [(f"{modules.module_name(path)}.ko", uncompress(base / path)) for path in order]


def has_pmem(root: Path, release: str) -> bool:
    """Whether the initrd of this kernel finds a root that is persistent memory."""
    return _has_modules(root, release, PMEM)


def has_crypt(root: Path, release: str) -> bool:
    """Whether init can encrypt the overlay's disk."""
    programs = all(resolve_inside(root, path).is_file() for path in CRYPT_PROGRAMS)
    aes = any(_has_modules(root, release, (name,)) for name in AES)
    return programs and aes and _has_modules(root, release, CRYPT)


def _has_modules(root: Path, release: str, wanted: Sequence[str]) -> bool:
    base = resolve_inside(root, f"/lib/modules/{release}")
    try:
        modules.plan_load_order(
            wanted, (base / "modules.dep").read_text(), (base / "modules.builtin").read_text()
        )
    except ImageError:
        return False
    return True


def uncompress(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        match path.suffix:
            case ".xz":
                return lzma.decompress(data)
            case ".gz":
                return gzip.decompress(data)
            case ".zst":
                return unpack_zstd(data)
    except (OSError, lzma.LZMAError) as error:
        raise ImageError(f"kernel module {path.name} cannot be read: {error}") from error
    return data


def unpack_zstd(data: bytes) -> bytes:
    # Python has zstd from 3.14 on only.
    try:
        result = subprocess.run(
            ["zstd", "-dcq"], input=data, capture_output=True, check=True, env={"PATH": "/usr/bin:/bin"}
        )
    except FileNotFoundError as error:
        raise ImageError("zstd is not installed", "Install the package zstd.") from error
    except subprocess.CalledProcessError as error:
        raise ImageError(f"zstd failed: {error.stderr.decode(errors='replace').strip()}") from error
    return result.stdout
