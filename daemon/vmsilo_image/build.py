"""One build from recipe to published version. Called by the command line; owns the build directory for as
long as it runs and leaves either a complete version or nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import tempfile
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from . import integrity, store, tools
from .contents import PACKAGES, describe_recipe, list_packages
from .errors import ImageError
from .initrd import build_initrd, has_crypt, has_pmem
from .progress import BootstrapOutput
from .rootfs import EXCLUDED, configure_root
from .tree import resolve_inside

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from .progress import Progress
    from .recipe import Recipe
    from .rootfs import GuestFiles

ROOT_IMAGE = "root.erofs"
ROOT_ALIGNMENT = 2 << 20  # bytes; persistent memory of a VM comes in huge pages
KERNEL = "vmlinuz"
INITRD = "initrd"
LOG_TAIL = 1 << 20  # bytes
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Order:
    """What is to be built, and where."""

    name: str
    recipe: Recipe
    images: Path
    guest: GuestFiles
    checked: Path = integrity.CHECKED_DIR


class Interrupted(BaseException):
    """A signal asked the builder to stop. Not an Exception: nothing on the way up may take it for a
    failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def unwinding_signals() -> Iterator[None]:
    """Turns the first stop signal into Interrupted; later ones do not disturb the cleaning up."""

    def unwind(number: int, _frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    before = {each: signal.signal(each, unwind) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def build_image(order: Order, progress: Progress) -> Path:
    """The published version's directory. On failure the log is kept and the error names it."""
    os.umask(0o022)
    try:
        with unwinding_signals(), store.private_build(order.images) as work:
            integrity.check_owner(order.images)
            log = work / "log"
            log.touch()
            try:
                built = _build(order, progress, work, log)
            except ImageError as error:
                raise _explain(error, order, log) from error
            finally:
                progress.done()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise full_disk(order.images) from error
        raise ImageError(f"{error.filename or order.images}: {error.strerror}") from error
    # Read back before anything starts from it, and remembered: the first start has that work saved.
    integrity.check_version(built, None, order.checked)
    return built


def _explain(error: ImageError, order: Order, log: Path) -> ImageError:
    """A full disk has many faces: a tool's output, an error of our own. Else the error, with its log."""
    cause = error.__cause__
    if (isinstance(cause, OSError) and cause.errno == errno.ENOSPC) or _says_full(log):
        return full_disk(order.images)
    kept = keep_log(log, order.name)
    hint = f"The whole output is in {kept}." if kept else None
    return ImageError(error.fact, " ".join(filter(None, (error.hint, hint))))


def _says_full(log: Path) -> bool:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL))
        return os.strerror(errno.ENOSPC).encode() in file.read()


def full_disk(images: Path) -> ImageError:
    status = os.statvfs(images)
    free = status.f_bavail * status.f_frsize >> 20
    return ImageError(
        f"the disk of {images} is full: {free} MiB are left, and a build takes some 2 GiB until it is done",
        "Make room, for example: sudo vmsilo image gc",
    )


def _build(order: Order, progress: Progress, work: Path, log: Path) -> Path:
    root = work / "root"
    ready = work / "out"
    ready.mkdir(mode=0o755)
    progress.begin("lists")
    watcher = BootstrapOutput(progress)
    # INITRD=No: the distribution's own initrd would take longer to make than all of ours.
    env = {"INITRD": "No", "DEBIAN_FRONTEND": "noninteractive", "TMPDIR": str(work)}
    tools.run_tool(plan_bootstrap(order.recipe, root), log, env=env, on_line=watcher.feed)
    progress.begin("configure")
    release, kernel = find_kernel(root)
    shutil.copyfile(kernel, ready / KERNEL)
    (ready / INITRD).write_bytes(build_initrd(root, release, order.guest.read("init")))
    kernel_facts = KernelFacts(release, has_pmem(root, release), has_crypt(root, release))
    packages = list_packages(root)
    (ready / PACKAGES).write_text(json.dumps(packages, indent=0) + "\n")
    configure_root(root, release, order.recipe, order.guest, log)
    progress.begin("pack")
    pack_root(order.recipe, root, ready / ROOT_IMAGE, progress, log)
    progress.begin("publish")
    version = write_manifest(order, ready, kernel_facts, len(packages))
    for path in ready.iterdir():
        path.chmod(0o644)
    return store.publish(order.images, order.name, ready, version)


def plan_bootstrap(recipe: Recipe, root: Path) -> list[str]:
    include = ",".join(dict.fromkeys((recipe.kernel, *recipe.packages)))
    return [
        *("mmdebstrap", "--mode=root", f"--variant={recipe.variant}", "--format=directory", "--verbose"),
        *(f"--dpkgopt={option}" for option in EXCLUDED),
        '--aptopt=APT::Install-Recommends "false"',
        *(f"--include={include}", "--", recipe.suite, str(root)),
    ]


def plan_pack(recipe: Recipe, root: Path, target: Path) -> list[str]:
    """Options that erofs-utils has had since 1.5. --preserve-mtime: compiled Python modules are valid for
    the modification time of their source."""
    # Linux uses a file in place (DAX) only where its end does not lie beside its inode.
    plain = recipe.compression == "none"
    compress = ["-Enoinline_data"] if plain else [f"-z{recipe.compression}", "-C65536"]
    return ["mkfs.erofs", "--quiet", "--preserve-mtime", *compress, str(target), str(root)]


def find_kernel(root: Path) -> tuple[str, Path]:
    """(release, vmlinuz) of the newest kernel installed."""
    boot = resolve_inside(root, "/boot")
    found = sorted(boot.glob("vmlinuz-*"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ImageError("the image has no kernel in /boot", "Name a package with one as `kernel`.")
    return found[-1].name.removeprefix("vmlinuz-"), found[-1]


def pack_root(recipe: Recipe, root: Path, target: Path, progress: Progress, log: Path) -> None:
    """mkfs.erofs says nothing on its way: the bar follows the size of its output."""
    ratio = 1.0 if recipe.compression == "none" else 0.45
    expected = max(1.0, ratio * sum(p.lstat().st_size for p in root.rglob("*") if not p.is_dir()))
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            if target.exists():
                progress.advance(target.stat().st_size / expected)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        tools.run_tool(plan_pack(recipe, root, target), log)
    finally:
        over.set()
        watcher.join()
    size = -(-target.stat().st_size // ROOT_ALIGNMENT) * ROOT_ALIGNMENT
    os.truncate(target, size)
    if size > recipe.size_limit:
        raise ImageError(
            f"the root image has {size >> 20} MiB, more than size_limit ({recipe.size_limit >> 20} MiB)",
            "Leave packages out, or raise size_limit in the recipe.",
        )


@dataclass(frozen=True)
class KernelFacts:
    """`pmem`: it takes a root that is persistent memory. `crypt`: init can encrypt the overlay's disk."""

    release: str
    pmem: bool
    crypt: bool


def write_manifest(order: Order, ready: Path, kernel: KernelFacts, packages: int) -> str:
    """Writes manifest.json and returns the version: time in UTC, then the start of a digest of the files."""
    digests = {path.name: hash_file(path) for path in sorted(ready.iterdir())}
    built = datetime.now(UTC)
    short = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:8]
    version = f"{built:%Y%m%dT%H%M%SZ}-{short}"
    manifest = {
        "name": order.name,
        "version": version,
        "suite": order.recipe.suite,
        "built": built.isoformat(timespec="seconds"),
        "kernel": kernel.release,
        "pmem": kernel.pmem,
        "crypt": kernel.crypt,
        # Its init finds the overlay of its root and the kept paths on disks, by their serial numbers.
        "disks": True,
        "packages": packages,
        "user": order.recipe.user,
        "uid": order.recipe.uid,
        "keep": order.recipe.keep,
        "recipe": describe_recipe(order.recipe),
        "recipe_sha256": order.recipe.digest(),
        "agent_sha256": order.guest.digest(),
        "sizes": {name: (ready / name).stat().st_size for name in digests},
        "sha256": digests,
    }
    (ready / store.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return version


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep_log(log: Path, name: str) -> Path | None:
    """Where the log of a failed build is now; None when there is no room for it."""
    try:
        descriptor, path = tempfile.mkstemp(prefix=f"vmsilo-image-{name}-", suffix=".log")
        with os.fdopen(descriptor, "wb") as target:
            target.write(log.read_bytes())
    except OSError:
        return None
    return Path(path)
