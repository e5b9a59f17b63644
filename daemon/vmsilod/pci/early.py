"""The program vmsilo-pci-claim: keeps the isolated PCI devices from the host's drivers, early in a boot.

Run by vmsilo-pci-claim.service before udev looks at any device, and by the hooks of initramfs-tools and
dracut (`list`, `initramfs DIR KERNEL`). It has the standard library only, asks no daemon, and reads of the
configuration no more than the one list; `vmsilo check` tells what is wrong with the rest.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from vmsilod.errors import VmsiloError
from vmsilod.pci.address import parse_address
from vmsilod.pci.binding import execute
from vmsilod.pci.initramfs import PARAMETER, write_initramfs
from vmsilod.pci.plan import plan_isolation
from vmsilod.pci.roots import Roots
from vmsilod.pci.topology import read_text, read_topology
from vmsilod.pci.usage import find_usage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CONFIG_ROOTS = (Path("/usr/share/vmsilo"), Path("/etc/vmsilo"))  # as config.load.DEFAULT_ROOTS
KEY = "isolated_pci_devices"
MODPROBE_SECONDS = 30
USAGE = "usage: vmsilo-pci-claim [list | initramfs DIRECTORY KERNEL]"


def read_isolated(roots: Sequence[Path] = CONFIG_ROOTS) -> tuple[list[str], list[str]]:
    """The list, as config.load would merge it, and what is wrong with the files or with an entry."""
    values: list[object] = []
    problems: list[str] = []
    for path in _find_files(roots):
        try:
            status = path.stat()
            if status.st_uid or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise ValueError("it can be written by others than root")
            value = tomllib.loads(path.read_text(encoding="utf-8")).get(KEY)
        except (OSError, ValueError) as error:
            problems.append(f"{path}: {error}")
            continue
        if value is not None:
            values = value if isinstance(value, list) else [value]
    addresses: list[str] = []
    for value in values:
        try:
            addresses.append(parse_address(str(value)))
        except ValueError as error:
            problems.append(f"{KEY}: {error}")
    return list(dict.fromkeys(addresses)), problems


def is_switched_off(roots: Roots) -> bool:
    """By the kernel's command line; the last word on it counts, as for udev."""
    words = [word.partition("=") for word in read_text(roots.proc / "cmdline").split()]
    return [value for key, _, value in words if key == PARAMETER][-1:] == ["off"]


def isolate(addresses: Sequence[str], roots: Roots) -> list[str]:
    """Each as far as it goes; what went wrong."""
    if is_switched_off(roots):
        print(f"vmsilo-pci-claim: no device is isolated, as {PARAMETER}=off says", file=sys.stderr)
        return []
    problems = []
    for address in addresses:
        topology = read_topology(roots)
        try:
            execute(plan_isolation(topology, find_usage(roots, topology), address), roots)
        except VmsiloError as error:
            problems.append(f"{address} is not isolated: {error}")
    return problems


def main(argv: Sequence[str]) -> int:
    addresses, problems = read_isolated()
    match argv:
        case []:
            if addresses:
                _load_driver()
                # No names: reading pci.ids would be most of its time.
                problems += isolate(addresses, Roots(ids=()))
        case ["list"]:
            print("".join(f"{address}\n" for address in addresses), end="")
        case ["initramfs", folder, kernel] if kernel and "/" not in kernel:
            try:
                write_initramfs(addresses, Path(folder), kernel, Roots())
            except VmsiloError as error:
                problems.append(str(error))
        case _:
            print(USAGE, file=sys.stderr)
            return 2
    for problem in problems:
        print(f"vmsilo-pci-claim: {''.join(c for c in problem if c.isprintable())}", file=sys.stderr)
    return 1 if problems else 0


def _find_files(roots: Sequence[Path]) -> Iterator[Path]:
    """The global file that counts, then its drop-ins in the order of their names."""
    mains = [root / "vmsilo.toml" for root in roots if (root / "vmsilo.toml").exists()]
    yield from mains[-1:]
    found: dict[str, Path] = {}
    for root in roots:
        for path in sorted((root / "vmsilo.toml.d").glob("*.toml")):
            if not path.name.startswith("."):
                found[path.name] = path
    yield from (found[name] for name in sorted(found) if found[name].resolve() != Path(os.devnull))


def _load_driver() -> None:
    """Where this fails, the devices are kept from the host's drivers all the same."""
    try:
        subprocess.run(
            ["modprobe", "--", "vfio-pci"],
            stdin=subprocess.DEVNULL,
            check=False,
            timeout=MODPROBE_SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"vmsilo-pci-claim: vfio-pci is not loaded: {error}", file=sys.stderr)
