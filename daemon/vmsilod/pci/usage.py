"""What the host itself does with a PCI function: disks, the network, the screen, keyboards.

`find_usage` reads sysfs and procfs below the given roots and changes nothing. Called in a worker before a
function is taken from the host, and by vmsilo-pci-claim at boot. It errs on the side of "in use".
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vmsilod.pci.address import find_addresses
from vmsilod.pci.topology import read_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmsilod.pci.roots import Roots
    from vmsilod.pci.topology import Function, Topology

RTF_UP, RTF_REJECT = 0x1, 0x200  # linux/route.h
KEYS_OF_A_KEYBOARD = 0xFFFF_FFFE  # KEY_ESC to KEY_S: what udev takes a keyboard for


@dataclass(frozen=True)
class Usage:
    """`reasons`: address -> why the host cannot do without it; `warnings`: what it would miss. `needed`: the
    host's disks and network, which it would miss as much if they were kept from it at boot.
    """

    reasons: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    warnings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    needed: frozenset[str] = frozenset()


def find_usage(roots: Roots, topology: Topology) -> Usage:
    reasons: dict[str, list[str]] = {}
    for find in (_find_disks, _find_network):
        for address, reason in find(roots):
            reasons.setdefault(address, []).append(reason)
    needed = frozenset(reasons)
    for function in topology.functions.values():
        found = [*_find_screens(roots, function)]
        if function.virtual_functions:
            found.append(f"has {function.virtual_functions} virtual functions")
        if found:
            reasons.setdefault(function.address, []).extend(found)
    warnings = dict.fromkeys(_find_keyboards(roots), ("has the only keyboard of this host",))
    told = {address: tuple(dict.fromkeys(found)) for address, found in reasons.items()}
    return Usage(told, warnings, needed)


def _find_disks(roots: Roots) -> Iterator[tuple[str, str]]:
    mounted = _read_mounts(roots)
    swaps = {line.split()[0] for line in read_lines(roots.proc / "swaps")[1:] if line.strip()}
    for path in _list(roots.sys / "class/block"):
        addresses = _find_functions(path, roots)
        if not addresses:
            continue
        reason = _find_holder(path, roots, mounted, swaps)
        for address in addresses if reason else ():
            yield address, f"{path.name} {reason}"


def _find_functions(block: Path, roots: Roots) -> set[str]:
    real = block.resolve()
    addresses = set(find_addresses(str(real)))
    if not addresses and "nvme-subsystem" in real.parts:
        # The disk of several paths: its controllers are links beside it.
        subsystem = roots.sys / Path(*real.parts[len(roots.sys.resolve().parts) :])
        for above in subsystem.parents:
            if above.name.startswith("nvme-subsys"):
                for link in above.glob("nvme*"):
                    addresses |= set(find_addresses(str(link.resolve())))
                break
    return addresses


def _find_holder(block: Path, roots: Roots, mounted: Mapping[str, str], swaps: set[str]) -> str:
    name = block.name
    place = mounted.get(read_text(block / "dev")) or mounted.get(f"/dev/{name}")
    if place is not None:
        return f"is mounted on {place}"
    if f"/dev/{name}" in swaps:
        return "is swap space"
    holders = [holder.name for holder in _list(block / "holders")]
    if holders:
        return f"is a part of {', '.join(holders)}"
    try:
        # btrfs and ZFS on several disks, a mount in another namespace: the kernel knows. Nothing is read.
        os.close(os.open(roots.dev / name, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return "is held by the kernel" if error.errno == errno.EBUSY else ""
    return ""


def _read_mounts(roots: Roots) -> dict[str, str]:
    """MAJOR:MINOR and source -> mount point, in the host's namespace."""
    mounts: dict[str, str] = {}
    for line in read_lines(roots.proc / "1/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, source = before.split(), after.split()
        if len(fields) < 5 or len(source) < 2:
            continue
        place = "".join(c if c.isprintable() else "?" for c in fields[4])
        mounts.setdefault(fields[2], place)
        if source[1].startswith("/dev/"):
            mounts.setdefault(source[1], place)
    return mounts


def _find_network(roots: Roots) -> Iterator[tuple[str, str]]:
    routed = _read_default_links(roots)
    links = {path.name: path for path in _list(roots.sys / "class/net") if (path / "device").exists()}
    up = {name for name, path in links.items() if read_text(path / "operstate") == "up"}
    for name, path in links.items():
        if name in routed or _find_uppers(path, roots) & routed:
            reason = f"{name} has the default route"
        elif up == {name}:
            reason = f"{name} is the only network link that is up"
        else:
            continue
        for address in find_addresses(str(path.resolve())):
            yield address, reason


def _read_default_links(roots: Roots) -> set[str]:
    found = set()
    for line in read_lines(roots.proc / "net/route")[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == fields[7] == "00000000" and int(fields[3], 16) & RTF_UP:
            found.add(fields[0])
    for line in read_lines(roots.proc / "net/ipv6_route"):
        fields = line.split()
        is_default = len(fields) > 9 and fields[0] == "0" * 32 and fields[1] == "00"
        if is_default and int(fields[8], 16) & (RTF_UP | RTF_REJECT) == RTF_UP:
            found.add(fields[9])
    return found


def _find_uppers(path: Path, roots: Roots) -> set[str]:
    """Bridges, bonds and VLANs on top of a link, to any depth."""
    found: set[str] = set()
    waiting = [path]
    while waiting:
        for upper in waiting.pop().glob("upper_*"):
            name = upper.name.removeprefix("upper_")
            if name not in found:
                found.add(name)
                waiting.append(roots.sys / "class/net" / name)
    return found


def _find_screens(roots: Roots, function: Function) -> Iterator[str]:
    path = roots.function(function.address)
    for connector in sorted(path.glob("drm/card*/card*-*")):
        if (read_text(connector / "status"), read_text(connector / "enabled")) == ("connected", "enabled"):
            yield f"shows a picture on {connector.name.partition('-')[2]}"
    for framebuffer in sorted(path.glob("graphics/fb*")):
        yield f"is the console ({framebuffer.name})"
    if function.boot_vga and function.is_display and function.with_host:
        yield "is the console's graphics card"


def _find_keyboards(roots: Roots) -> set[str]:
    """The functions that every keyboard of this host is behind, if there is a keyboard."""
    behind: set[str] | None = None
    for path in _list(roots.sys / "class/input"):
        words = read_text(path / "device/capabilities/key").split()
        if words and int(words[-1], 16) & KEYS_OF_A_KEYBOARD == KEYS_OF_A_KEYBOARD:
            addresses = set(find_addresses(str(path.resolve())))
            behind = addresses if behind is None else behind & addresses
    return behind or set()


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
