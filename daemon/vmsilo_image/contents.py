"""What a version was made of: the Debian packages in it, and its recipe as it was. Written by the build,
read to tell two versions apart (`vmsilo image diff`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import ImageError
from .tree import resolve_inside
from .versions import read_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from .recipe import Recipe

PACKAGES = "packages.json"
INSTALLED = "install ok installed"
FACTS = ("suite", "kernel", "user", "uid", "pmem", "crypt")


def list_packages(root: Path) -> dict[str, str]:
    """name -> version of what dpkg has installed in a guest's root; a package of a second architecture is
    NAME:ARCHITECTURE."""
    status = resolve_inside(root, "/var/lib/dpkg/status")
    try:
        text = status.read_text(errors="replace")
    except OSError as error:
        raise ImageError(f"the image has no list of packages: {error.strerror}") from error
    found: dict[str, str] = {}
    for stanza in text.split("\n\n"):
        lines = (line.partition(": ") for line in stanza.splitlines() if not line.startswith(" "))
        values = {key: value for key, _, value in lines}
        if values.get("Status") != INSTALLED or "Package" not in values:
            continue
        name = values["Package"]
        if name in found:
            name = f"{name}:{values.get('Architecture', '')}"
        found[name] = values.get("Version", "")
    return dict(sorted(found.items()))


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what its files hold: the manifest is for everybody to read."""
    described = recipe.model_dump(mode="json")
    described["files"] = {
        entry.path: f"{entry.mode} {entry.owner} {_digest(entry.source, entry.content)}"
        for entry in recipe.files
    }
    return described


def _digest(source: Path | None, content: str | None) -> str:
    try:
        data = source.read_bytes() if source is not None else (content or "").encode()
    except OSError as error:
        raise ImageError(f"{source} cannot be read: {error.strerror}") from error
    return hashlib.sha256(data).hexdigest()[:16]


@dataclass(frozen=True)
class Difference:
    """From `old` to `new`. A pair has None for what one of the two does not have."""

    old: str
    new: str
    sizes: dict[str, tuple[int, int]]
    packages: dict[str, tuple[str | None, str | None]] | None
    """None: one of the two has no list."""
    recipe: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    facts: dict[str, tuple[Any, Any]] = field(default_factory=dict)


def compare(old: Path, new: Path) -> Difference:
    manifests = [_manifest(path) for path in (old, new)]
    lists = [_load_packages(path) for path in (old, new)]
    recipes = [manifest.get("recipe") for manifest in manifests]
    facts: dict[str, tuple[Any, Any]] = _changes(
        *({key: manifest.get(key) for key in (*FACTS, "agent_sha256")} for manifest in manifests)
    )
    if recipes[0] is None or recipes[1] is None:
        digests = [manifest.get("recipe_sha256") for manifest in manifests]
        if digests[0] != digests[1]:
            facts["recipe_sha256"] = (digests[0], digests[1])
    before, after = (
        {child.name: child.stat().st_size for child in path.iterdir() if child.suffix != ".json"}
        for path in (old, new)
    )
    return Difference(
        old=f"{old.parent.name}/{old.name}",
        new=f"{new.parent.name}/{new.name}",
        sizes={name: (before.get(name, 0), after.get(name, 0)) for name in sorted({*before, *after})},
        packages=None if lists[0] is None or lists[1] is None else _changes(lists[0], lists[1]),
        recipe=_compare_recipes(recipes[0], recipes[1]) if recipes[0] and recipes[1] else {},
        facts=facts,
    )


def _compare_recipes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Lists and files entry by entry: `packages: NAME`, `files: PATH`."""
    return _changes(_flatten(old), _flatten(new))


def _flatten(recipe: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, list):
            flat.update({f"{key}: {item}": "yes" for item in value})
        elif isinstance(value, dict):
            flat.update({f"{key}: {name}": item for name, item in value.items()})
        else:
            flat[key] = value
    return flat


def _changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = sorted({*old, *new})
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _manifest(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    if manifest is None:
        raise ImageError(f"{path} has no readable manifest", "vmsilo image verify")
    return manifest


def _load_packages(path: Path) -> dict[str, str] | None:
    try:
        data = json.loads((path / PACKAGES).read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
