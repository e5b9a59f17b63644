"""The option `image`: a name, or a table that also says how the image's root comes into the VM.

Called by the schema (GlobalImage, VmImage), the model (resolve_image) and the loader (check_image). A VM's
table, key by key, has priority over the global one; its plain name replaces the name alone.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from vmsilod.config.problems import Problem
from vmsilod.config.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmsilod.config.schema import VmFile

KEEP_MAX = 86400  # seconds
_IMAGE_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}")

RootDevice = Literal["auto", "disk", "pmem"]
ShortOfPages = Literal["refuse", "page-cache"]
KeepSeconds = Annotated[int, Field(ge=0, le=KEEP_MAX)]


def _check_image(name: str) -> str:
    if not _IMAGE_NAME.fullmatch(name):
        raise ValueError(f"'{name}' is not an image name: up to 64 letters, digits, '.', '_' or '-'")
    return name


ImageName = Annotated[str, AfterValidator(_check_image)]


class ImageOptions(Table):
    """How the root of an image is kept on the host (hugepages, short_of_pages, keep) and what it is in the
    guest (device).
    """

    hugepages: bool = False
    device: RootDevice = "auto"
    short_of_pages: ShortOfPages = "refuse"
    keep: KeepSeconds = 60
    """Seconds that its pages are kept after the last VM that uses them has stopped."""


class GlobalImage(ImageOptions):
    name: ImageName = "default"


class VmImage(Table):
    """As written in a VM's file; None means "as the global file says"."""

    name: ImageName | None = None
    hugepages: bool | None = None
    device: RootDevice | None = None
    short_of_pages: ShortOfPages | None = None
    keep: KeepSeconds | None = None


def expand_image(value: Any) -> Any:  # whatever TOML gave; pydantic checks the result
    return {"name": _check_image(value)} if isinstance(value, str) else value


def resolve_image(settings: GlobalImage, vm: VmImage | None) -> dict[str, Any]:
    """The fields `image` and `image_options` of a VmConfig."""
    merged = settings.model_dump() | (vm.model_dump(exclude_none=True) if vm is not None else {})
    name = merged.pop("name")
    return {"image": name, "image_options": ImageOptions(**merged)}


def check_image(vm: VmFile, vmm: str, find_origin: Callable[[tuple[str, ...]], str]) -> list[Problem]:
    """What this VM's own table asks for and cannot have."""
    options = vm.image
    faults: list[tuple[str, str, str]] = []
    for key in ("hugepages", "device") if options is not None and vm.root_disk is not None else ():
        if getattr(options, key) in (True, "pmem"):
            faults.append((key, "only for an image's own root", "leave out root_disk, or this"))
    if options is not None and options.device == "pmem" and options.hugepages and vmm == "crosvm":
        hint = 'device = "auto", or hugepages = false'
        faults.append(("device", "crosvm cannot map huge pages as persistent memory", hint))
    return [
        Problem(find_origin(("image", key)), f"image.{key}", fact, hint, vm=vm.name)
        for key, fact, hint in faults
    ]
