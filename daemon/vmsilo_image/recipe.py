"""Recipes: what goes into an image. Owns the TOML grammar, the search path and `include`; called by build.
Reads recipe files only, never the files they name (those are read when the image is built).
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import ImageError

SEARCH = (Path("/etc/vmsilo/images.d"), Path("/usr/share/vmsilo/images.d"))
NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
MAX_INCLUDES = 8
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
SIZE = re.compile(r"([1-9][0-9]{0,11})([KMG]?)(?:iB)?")

PackageName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9+.-]+(:[a-z0-9]+)?$")]
Login = Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,30}$")]
Owner = Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,30}(:[a-z_][a-z0-9_-]{0,30})?$")]


class FileEntry(BaseModel):
    """One file that is put into the image after its packages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    source: Path | None = None
    content: str | None = None
    mode: Annotated[str, Field(pattern=r"^0?[0-7]{3,4}$")] = "0644"
    owner: Owner = "root:root"

    @field_validator("path")
    @classmethod
    def check_path(cls, path: str) -> str:
        parts = path.split("/")
        if not path.startswith("/") or any(part in ("", ".", "..") for part in parts[1:]) or "\0" in path:
            raise ValueError("a path is absolute, without '.', '..' and '//'")
        return path

    @model_validator(mode="after")
    def check_origin(self) -> FileEntry:
        if (self.source is None) == (self.content is None):
            raise ValueError("give exactly one of source and content")
        return self


class Recipe(BaseModel):
    """A whole recipe, what it includes already merged in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    suite: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")] = "trixie"
    variant: Literal["apt", "minbase", "essential", "required", "important", "standard"] = "apt"
    kernel: PackageName = "linux-image-cloud-amd64"
    packages: tuple[PackageName, ...] = ()
    files: tuple[FileEntry, ...] = ()
    user: Login = "user"
    uid: Annotated[int, Field(ge=1000, le=60000)] = 1000
    compression: Literal["none", "lz4", "lz4hc"] = "lz4"
    size_limit: int = 4 << 30
    keep: Annotated[int, Field(ge=1, le=1000)] = 2

    @field_validator("size_limit", mode="before")
    @classmethod
    def parse_size(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        found = SIZE.fullmatch(value)
        if not found:
            raise ValueError("a size is a number of bytes or like '512MiB', '4GiB'")
        return int(found[1]) * UNITS[found[2]]

    @field_validator("size_limit")
    @classmethod
    def check_size(cls, value: int) -> int:
        if value < 16 << 20:
            raise ValueError("the smallest limit is 16MiB")
        return value

    @field_validator("user")
    @classmethod
    def check_user(cls, value: str) -> str:
        if value == "root":
            raise ValueError("commands do not run as root; name another user")
        return value

    def digest(self) -> str:
        """sha256 of what was asked for; the contents of `source` files are not part of it."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def check_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ImageError(
            f"{name!r} is not an image name",
            "Use lower-case letters, digits and '-', at most 32, a letter first.",
        )
    return name


def find_recipe(name: str, builtin: Path, search: tuple[Path, ...] = SEARCH) -> Path:
    """The file for `name`; the built-in recipes lie beside `builtin`, that of the image "default"."""
    for folder in search:
        path = folder / f"{name}.toml"
        if path.is_file():
            return path
    beside = builtin.with_name(f"{name}.toml")
    if beside.is_file():
        return beside
    raise ImageError(f"there is no recipe {name}", f"Write {search[0]}/{name}.toml or give --recipe FILE.")


def load_recipe(path: Path, builtin: Path, search: tuple[Path, ...] = SEARCH) -> Recipe:
    """Reads `path` and what it includes. An ImageError lists every problem of every file, one per line."""
    problems: list[str] = []
    layers = _read_layers(path, builtin, search, problems)
    recipe = None
    if not problems:
        try:
            recipe = Recipe.model_validate(_merge(layers))
        except ValidationError as error:
            problems.extend(_describe(path, error))
    if recipe is None:
        raise ImageError("\n".join(problems), "docs/images.md lists the keys of a recipe.")
    return recipe


def _read_layers(
    path: Path, builtin: Path, search: tuple[Path, ...], problems: list[str]
) -> list[dict[str, object]]:
    """Outermost include first, each checked by itself, so that a problem names the file it is in."""
    layers: list[dict[str, object]] = []
    seen: list[Path] = []
    here: Path | None = path
    while here is not None:
        if here in seen or len(seen) == MAX_INCLUDES:
            problems.append(f"{path}: include: the chain of recipes does not end ({here})")
            break
        seen.append(here)
        data = _read_toml(here, problems)
        # The built-in recipe ends every chain that no file ends earlier.
        include = data.pop("include", "none" if here == builtin else "default")
        try:
            Recipe.model_validate(data)
        except ValidationError as error:
            problems.extend(_describe(here, error))
        layers.insert(0, _anchor_sources(data, here.parent))
        here = _find_include(include, here, builtin, search, problems)
    return layers


def _find_include(
    include: object, here: Path, builtin: Path, search: tuple[Path, ...], problems: list[str]
) -> Path | None:
    if include == "none":
        return None
    if not isinstance(include, str) or not NAME.fullmatch(include):
        problems.append(f"{here}: include: not the name of a recipe")
        return None
    # /etc/vmsilo/images.d/default.toml may itself extend "default": that is the built-in one.
    if include == "default" and here.name == "default.toml":
        return builtin
    try:
        return find_recipe(include, builtin, search)
    except ImageError as error:
        problems.append(f"{here}: include: {error.fact}")
        return None


def _read_toml(path: Path, problems: list[str]) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{path}: {error}")
    return {"include": "none"}


def _anchor_sources(data: dict[str, object], folder: Path) -> dict[str, object]:
    """`source` is relative to the recipe that names it."""
    files = data.get("files")
    if not isinstance(files, list):
        return data
    anchored = [
        {**entry, "source": str(folder / entry["source"])}
        if isinstance(entry, dict) and isinstance(entry.get("source"), str)
        else entry
        for entry in files
    ]
    return {**data, "files": anchored}


def _merge(layers: list[dict[str, object]]) -> dict[str, object]:
    """Lists add up (a package once, a file's last entry for a path wins); any other key is replaced."""
    merged: dict[str, object] = {}
    packages: dict[str, None] = {}
    files: dict[str, object] = {}
    for layer in layers:
        merged.update(layer)
        names = layer.get("packages", [])
        if isinstance(names, list):
            packages.update(dict.fromkeys(names))
        entries = layer.get("files", [])
        if isinstance(entries, list):
            files.update({entry["path"]: entry for entry in entries})
    return {**merged, "packages": list(packages), "files": list(files.values())}


def _describe(path: Path, error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        fact = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
        lines.append(f"{path}: {key or 'recipe'}: {fact.removeprefix('Value error, ')}")
    return lines
