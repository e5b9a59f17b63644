"""Removes versions: one that somebody names, or those that gc finds nobody needs. Called by the command
line, as root.

What a VM runs from is never removed (usage.py says who uses what). A version goes by one rename out of its
image, made while the kernel keeps everybody from opening its files; only then is it deleted. Whoever is
killed in between leaves a `.gone-*` directory, which no VM can start from and the next of us deletes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import integrity, store
from .errors import ImageError
from .usage import load_uses, unused
from .versions import find_previous, list_versions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .usage import Use
    from .versions import Version

KEEP = 2  # versions of each image, where neither recipe nor command line says


@dataclass(frozen=True)
class Places:
    """Where things are on this host."""

    images: Path
    state: Path
    checked: Path


def remove_version(places: Places, path: Path) -> None:
    """ImageError if it is the current version, or if somebody uses it."""
    folder = path.parent
    with store.hold_store(places.images):
        if store.read_link(folder / store.CURRENT) == path.name:
            hint = f"sudo vmsilo image rm {folder.name} --all"
            if find_previous(folder):
                hint = (
                    f"sudo vmsilo image use {folder.name} previous, then rm; or for the whole image: {hint}"
                )
            raise ImageError(f"{path.name} is the current version of image {folder.name}", hint)
        aside = _set_version_aside(places, path)
    integrity.forget(path, places.checked)
    store.remove_tree(aside)


def _set_version_aside(places: Places, path: Path) -> Path:
    """The caller holds the store."""
    refuse_used([path], load_uses(places.state))
    with unused(_files(path)):
        aside = store.set_aside(places.images, path)
    if store.read_link(path.parent / store.PREVIOUS) == path.name:
        (path.parent / store.PREVIOUS).unlink(missing_ok=True)
    return aside


def remove_image(places: Places, name: str) -> list[str]:
    """All versions and the image itself; returns the versions' names."""
    folder = places.images / name
    if not folder.is_dir():
        raise ImageError(f"there is no image {name} in {places.images}", "vmsilo image list")
    with store.hold_store(places.images):
        paths = [each.path for each in list_versions(places.images, name)]
        refuse_used(paths, load_uses(places.state))
        with unused([file for path in paths for file in _files(path)]):
            aside = store.set_aside(places.images, folder)
    for path in paths:
        integrity.forget(path, places.checked)
    store.remove_tree(aside)
    return [path.name for path in paths]


def refuse_used(paths: Sequence[Path], uses: Sequence[Use]) -> None:
    for path in paths:
        if vms := sorted(use.vm for use in uses if use.is_of(path)):
            which = f"VM {vms[0]} runs" if len(vms) == 1 else f"VMs {', '.join(vms)} run"
            raise ImageError(
                f"{which} from version {path.name} of image {path.parent.name}", f"vm-stop {' '.join(vms)}"
            )


def _files(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_file() and not child.is_symlink())


def plan_gc(versions: Sequence[Version], uses: Sequence[Use], keep: int | None = None) -> list[Version]:
    """Which to remove, the oldest first. Kept are the current and the previous version of each image, what
    VMs run from, and the newest `keep` that are not broken (None: as the current version's recipe says)."""
    doomed = []
    for name in sorted({each.name for each in versions}):
        of_image = sorted((v for v in versions if v.name == name), key=lambda v: v.version, reverse=True)
        said = next((each.keep for each in of_image if each.current), None)
        count = keep if keep is not None else said or KEEP
        newest = {each.version for each in [v for v in of_image if not v.broken][:count]}
        doomed += [
            each
            for each in reversed(of_image)
            if not (each.current or each.previous or each.version in newest)
            and not any(use.is_of(each.path) for use in uses)
        ]
    return doomed


def collect(places: Places, doomed: Sequence[Version]) -> tuple[list[Version], list[ImageError]]:
    """Removes them; what has come into use in the meantime stays. Returns what went, and why others did
    not."""
    gone, kept = [], []
    for each in doomed:
        try:
            with store.hold_store(places.images):
                now = [v for v in list_versions(places.images, each.name) if v.version == each.version]
                if not now or now[0].current or now[0].previous:
                    continue
                aside = _set_version_aside(places, each.path)
            integrity.forget(each.path, places.checked)
            store.remove_tree(aside)
            gone.append(each)
        except ImageError as error:
            kept.append(error)
    return gone, kept
