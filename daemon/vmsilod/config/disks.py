"""Disks beside the root: the models of `root_overlay`, `additional_disks` and `persist`, and what only the
VM's file as a whole can tell to be wrong with them.

Used by schema, model and checks of this package. A model never looks at the machine.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

from pydantic import AfterValidator, BeforeValidator, Field

from vmsilod.config.problems import Problem
from vmsilod.config.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DISKS_MAX = 16
PERSIST_MAX = 64
MIN_SIZE = 16 << 20  # bytes; an ext4 with a journal is not made smaller
MAX_SIZE = 1 << 50
PERSIST_SERIAL = "vmsilo-persist"
PERSIST_ID = "persist"
"""What people call the disk of `persist`; no disk of theirs has this id."""
_RESERVED = (PERSIST_ID, "root", "overlay")
# virtio-blk's serial number has 20 bytes, and udev names /dev/disk/by-id/virtio-SERIAL after it.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,19}")
_SIZE = re.compile(r"([1-9][0-9]{0,12})([KMGT]?)(?:iB)?")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# These are the guest's own at every boot, or hold nothing that could be kept.
_VOLATILE = tuple(PurePosixPath(path) for path in ("/proc", "/sys", "/dev", "/run", "/tmp"))
_NAME_MAX = 255
_PRIVATE = (PurePosixPath("/tmp"), PurePosixPath("/var/tmp"))


def parse_size(text: str) -> int:
    """Bytes, a multiple of 4096, of "10G" (1024-based; K, M, G, T or nothing). Raises ValueError."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError(f"'{text}' is not a size such as \"10G\"")
    size = int(found[1]) * _UNITS[found[2]]
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"'{text}' is not between 16M and 1024T")
    return size // 4096 * 4096


def _check_size(text: str) -> str:
    parse_size(text)
    return text


def check_disk_id(text: str) -> str:
    if not _ID.fullmatch(text):
        raise ValueError(f"'{text}' is not the id of a disk: up to 20 letters, digits, '_', '.' or '-'")
    if text in _RESERVED or text.startswith("vmsilo-"):
        raise ValueError(f"'{text}' is vmsilo's own name for a disk")
    return text


def _check_disk_path(path: str) -> str:
    if not path.startswith("/") or path == "/":
        raise ValueError(f"'{path}' is not an absolute path of a file")
    if not path.isprintable():
        raise ValueError(f"'{path}' has a control character in it")
    if ".." in PurePosixPath(path).parts:
        raise ValueError(f"'{path}' has '..' in it")
    return path


def _check_mount(path: str) -> str:
    _check_guest_path(path)
    # systemd.unit(5): a mount unit is called after its place; what has to be escaped there is not taken.
    if not re.fullmatch(r"[A-Za-z0-9_./-]+", path):
        raise ValueError(f"'{path}' has a character in it other than letters, digits, '_', '.', '-' and '/'")
    return path


def _check_guest_path(path: str) -> PurePosixPath:
    if not path.startswith("/"):
        raise ValueError(f"'{path}' is not an absolute path")
    if not path.isprintable():
        raise ValueError(f"'{path}' has a control character in it")
    parts = path.split("/")[1:]
    if path != "/" and any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"'{path}' has an empty step, '.' or '..' in it")
    pure = PurePosixPath(path)
    if path == "/" or any(pure == top or top in pure.parents for top in _VOLATILE):
        raise ValueError(
            f"'{path}' cannot be this: the guest makes it anew at each boot, or it is everything"
        )
    return pure


def persist_name(path: str) -> str:
    """The name of this path's copy on the disk of kept paths: of every path another, and a single step."""
    return quote(path[1:], safe="")


def _check_persist(paths: tuple[str, ...]) -> tuple[str, ...]:
    for path in paths:
        _check_guest_path(path)
        if len(persist_name(path)) > _NAME_MAX:
            raise ValueError(f"'{path}' is too long")
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(f"names {', '.join(twice)} more than once")
    return paths


Size = Annotated[str, AfterValidator(_check_size)]
PersistPaths = Annotated[
    tuple[str, ...], Field(strict=False, max_length=PERSIST_MAX), AfterValidator(_check_persist)
]


class RootOverlay(Table):
    """Where the guest's writes to its read-only root go; `qcow2` is another name for `disk`."""

    type: Literal["disk", "qcow2", "tmpfs"] = "disk"
    size: Size = "10G"

    @property
    def on_disk(self) -> bool:
        return self.type != "tmpfs"


class DiskCreate(Table):
    """What a disk that is not there yet is made as, at the VM's next start."""

    size: Size
    filesystem: Literal["ext4", "none"] = "ext4"


class AdditionalDisk(Table):
    """`id`: its serial number; None: "diskN" by its place in the list. `lock`: against other programs of the
    host; two VMs never get the same disk if one writes.
    """

    path: Annotated[str, AfterValidator(_check_disk_path)]
    id: Annotated[str, AfterValidator(check_disk_id)] | None = None
    ro: bool = False
    sparse: bool = True
    direct: bool = False
    lock: bool = True
    block_size: Literal[512, 1024, 2048, 4096] = 512
    format: Literal["raw", "qcow2"] = "raw"
    create: DiskCreate | None = None
    mount: Annotated[str, AfterValidator(_check_mount)] | None = None


def _expand(value: Any) -> Any:  # whatever TOML gave; pydantic checks the result
    """A bare path means {path}; block-size and o_direct are crosvm's names."""
    if isinstance(value, str):
        return {"path": value}
    if not isinstance(value, dict):
        return value
    known = {"block-size": "block_size", "o_direct": "direct", "readonly": "ro"}
    return {known.get(key, key) if known.get(key) not in value else key: v for key, v in value.items()}


def _name_all(disks: tuple[AdditionalDisk, ...]) -> tuple[AdditionalDisk, ...]:
    named = tuple(
        disk if disk.id is not None else disk.model_copy(update={"id": f"disk{number}"})
        for number, disk in enumerate(disks)
    )
    for key in ("id", "mount", "path"):
        values = [value for disk in named if (value := getattr(disk, key)) is not None]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"two disks have the {key} {', '.join(twice)}")
    for disk in named:
        if disk.create is not None and (disk.ro or disk.format != "raw"):
            raise ValueError(f"'{disk.path}' cannot be created: it is read-only, or not raw")
    return named


AdditionalDisks = Annotated[
    tuple[Annotated[AdditionalDisk, BeforeValidator(_expand)], ...],
    Field(strict=False, max_length=DISKS_MAX),
    AfterValidator(_name_all),
]


class DiskOptions(Table):
    """What a VM's file says about disks, but for its root."""

    root_overlay: RootOverlay = RootOverlay()
    additional_disks: AdditionalDisks = ()
    persist: PersistPaths = ()
    persist_size: Size = "4G"


def find_faults(
    options: DiskOptions, *, root_readonly: bool, own_boot: bool, vmm: str
) -> Sequence[tuple[str, str, str]]:
    """(key, fact, hint). `own_boot`: the VM has a kernel or initramfs of its own."""
    faults = []
    if options.persist and not root_readonly:
        fact = "the root itself keeps everything (root_disk_readonly = false)"
        faults.append(("persist", fact, "leave one of the two out"))
    elif options.persist and own_boot:
        fact = "needs the image's initramfs, and the VM has a kernel or an initramfs of its own"
        faults.append(("persist", fact, "leave one of the two out"))
    for disk in options.additional_disks:
        path = PurePosixPath(disk.path)
        if any(top in path.parents for top in _PRIVATE):
            fact = f"'{disk.path}': vmsilod has a {path.parents[-2]} of its own and does not see this one"
            faults.append(
                ("additional_disks", fact, "put it elsewhere, such as below /var/lib/vmsilo/disks")
            )
        if disk.block_size != 512 and vmm == "cloud-hypervisor":
            fact = f"'{disk.path}': cloud-hypervisor knows no block_size"
            faults.append(("additional_disks", fact, 'set vmm to "crosvm" or "qemu"'))
        if disk.mount and any(_is_within(disk.mount, path) for path in options.persist):
            fact = f"'{disk.mount}' is in a path that persist keeps"
            faults.append(("additional_disks", fact, "mount it elsewhere"))
    return faults


def _is_within(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")


def check_disks(
    name: str, faults: Sequence[tuple[str, str, str]], find_origin: Callable[[tuple[str, ...]], str]
) -> list[Problem]:
    return [Problem(find_origin((key,)), key, fact, hint, vm=name) for key, fact, hint in faults]
