"""Where the kernel's trees are, and the one way to write to them: the edge of this package.

Whatever reads or writes here takes a Roots, so that a recorded tree with a kernel of its own can stand in
for this machine. Values only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PCI_IDS = ("/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids")


def write_attribute(path: Path, text: str) -> None:
    """One write(2), since sysfs takes each as a request; "" is a line end, which clears driver_override."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, f"{text}\n".encode())
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Roots:
    sys: Path = Path("/sys")
    proc: Path = Path("/proc")
    dev: Path = Path("/dev")
    udev: Path = Path("/run/udev")
    ids: tuple[str, ...] = PCI_IDS
    write: Callable[[Path, str], None] = write_attribute

    def function(self, address: str) -> Path:
        return self.sys / "bus/pci/devices" / address

    def driver(self, name: str) -> Path:
        return self.sys / "bus/pci/drivers" / name

    def group_node(self, group: int) -> Path:
        return self.dev / "vfio" / str(group)
