"""Which kernel modules an initrd needs, from the modules.dep and modules.builtin of a kernel package. Pure;
called by initrd.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterable

SUFFIXES = (".xz", ".zst", ".gz")


def module_name(path: str) -> str:
    """`kernel/drivers/char/hw_random/virtio-rng.ko.xz` -> `virtio_rng`, as the kernel itself spells it."""
    name = path.rpartition("/")[2]
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name.removesuffix(".ko").replace("-", "_")


def parse_dependencies(text: str) -> dict[str, tuple[str, ...]]:
    """modules.dep: path -> paths it needs. depmod lists them all, the last to be loaded first."""
    table: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        path, colon, needs = line.partition(":")
        if colon:
            table[path] = tuple(needs.split())
    return table


def plan_load_order(
    wanted: Iterable[str],
    dependencies: str,
    builtin: str,
    wanted_if_there: Iterable[str] = (),
    first_if_there: Iterable[str] = (),
) -> list[str]:
    """Paths to load, dependencies first, each once, but for what the kernel has built in. A wanted module
    that the kernel knows neither way is an ImageError that names all such modules."""
    table = parse_dependencies(dependencies)
    paths = {module_name(path): path for path in table}
    inside = {module_name(path) for path in builtin.split()}
    order: list[str] = []
    missing: list[str] = []
    optional = [name for name in wanted_if_there if name in paths]
    first = [name for name in first_if_there if name in paths]
    for raw in (*first, *wanted, *optional):
        name = raw.replace("-", "_")
        if name in paths:
            path = paths[name]
            order.extend(need for need in (*reversed(table[path]), path) if need not in order)
        elif name not in inside:
            missing.append(raw)
    if missing:
        raise ImageError(
            f"the kernel has no {', '.join(missing)}",
            "Choose a kernel package that has them, such as linux-image-cloud-amd64.",
        )
    return order
