"""What versions of which images there are, and which one somebody means. Called by the command line; reads
names, links and manifests only, and changes nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ImageError
from .recipe import NAME, check_name
from .store import CURRENT, MANIFEST, PREVIOUS, VERSION, read_link

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Version:
    """`size` is that of the files, `disk` what they take of the disk, in bytes; `broken`: no VM can start
    from it, for it has no readable manifest. `keep` is what its recipe says for gc."""

    name: str
    version: str
    path: Path
    current: bool
    previous: bool
    size: int
    disk: int
    built: str
    broken: bool
    keep: int | None = None


def list_versions(images: Path, name: str | None = None) -> list[Version]:
    """By name, the newest first."""
    found = []
    for folder in sorted(images.iterdir()) if images.is_dir() else []:
        if name in (None, folder.name) and NAME.fullmatch(folder.name) and folder.is_dir():
            current, previous = read_link(folder / CURRENT), find_previous(folder)
            for path in sorted(_version_paths(folder), reverse=True):
                found.append(_describe(path, current=path.name == current, previous=path.name == previous))
    return found


def _describe(path: Path, *, current: bool, previous: bool) -> Version:
    manifest = read_manifest(path)
    try:
        files = [child.lstat() for child in path.iterdir()]
    except OSError:  # it has just been removed
        files = []
    keep = (manifest or {}).get("keep")
    return Version(
        name=path.parent.name,
        version=path.name,
        path=path,
        current=current,
        previous=previous,
        size=sum(status.st_size for status in files),
        disk=sum(status.st_blocks * 512 for status in files),
        built=str((manifest or {}).get("built", "")),
        broken=manifest is None,
        keep=keep if isinstance(keep, int) else None,
    )


def _version_paths(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if VERSION.fullmatch(path.name) and path.is_dir()]


def find_previous(folder: Path) -> str | None:
    """The version that was current before; where nothing says so, the newest other one, an older one
    first."""
    current, named = read_link(folder / CURRENT), read_link(folder / PREVIOUS)
    others = sorted(path.name for path in _version_paths(folder) if path.name != current)
    if named in others:
        return named
    older = [name for name in others if current is None or name < current]
    found = older or others
    return found[-1] if found else None


def find_current(images: Path, name: str) -> Path:
    link = images / name / CURRENT
    if not link.is_symlink():
        raise ImageError(f"there is no image {name} in {images}", f"Build it: vmsilo image build {name}")
    path = images / name / link.readlink()
    if read_manifest(path) is None:
        raise ImageError(f"{path} has no readable {MANIFEST}", suggest_repair(images, name))
    return path


def find_version(images: Path, name: str, word: str) -> Path:
    """`word` is a version, the beginning of one, "current" or "previous"."""
    folder = images / check_name(name)
    if not folder.is_dir():
        raise ImageError(f"there is no image {name} in {images}", "vmsilo image list")
    if word == CURRENT:
        return find_current(images, name)
    if word == PREVIOUS:
        previous = find_previous(folder)
        if previous is None:
            raise ImageError(f"image {name} has no other version than its current one", "vmsilo image list")
        return folder / previous
    meant = [path for path in _version_paths(folder) if word and path.name.startswith(word)]
    if len(meant) == 1:
        return meant[0]
    which = "no version" if not meant else "more than one version"
    raise ImageError(f"image {name} has {which} {word!r}", "vmsilo image list")


def read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def suggest_repair(images: Path, name: str, bad: str = "") -> str:
    """What to do when the current version, or `bad`, cannot be used."""
    build = f"sudo vmsilo image build {name}"
    try:
        previous = find_previous(images / name)
    except OSError:
        previous = None
    if previous is None or previous == bad:
        return build
    return f"sudo vmsilo image use {name} previous, or {build}"
