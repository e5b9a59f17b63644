"""A PCI host in a directory: sysfs, procfs and /dev as the kernel lays them out, and a kernel that reacts.

`PciTree` writes the files; `write` is what its Roots writes with, and does what Linux does on a write to
driver_override, bind, unbind, drivers_probe, reset and uevent. It records every write, and fails the one
that a test chooses.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmsilod.pci.roots import Roots

if TYPE_CHECKING:
    from pathlib import Path

PCI_IDS = """\
# as of hwdata
8086  Intel Corporation
\t10d3  82574L Gigabit Network Connection
\t\t8086 a01f  Gigabit CT Desktop Adapter
\t1533  I210 Gigabit Network Connection
10de  NVIDIA Corporation
\t1b80  GP104 [GeForce GTX 1080]
C 02  Network controller
"""


@dataclass
class Spec:
    """One function: what its files say, and which driver its module is."""

    address: str
    kind: str = "020000"
    ids: str = "8086:10d3"
    driver: str = ""
    wants: str = ""
    group: int | None = None
    resets: str = "flr bus"
    parent: str = ""
    extra: dict[str, str] = field(default_factory=dict)


class PciTree:
    def __init__(self, root: Path, *specs: Spec, vfio: bool = True) -> None:
        self.root = root
        self.specs = {spec.address: spec for spec in specs}
        self.writes: list[tuple[str, str]] = []
        self.fail_at: int | None = None
        self.stubborn: set[str] = set()
        (root / "ids").parent.mkdir(parents=True, exist_ok=True)
        (root / "ids").write_text(PCI_IDS)
        (root / "dev/vfio").mkdir(parents=True)
        (root / "sys/bus/pci/devices").mkdir(parents=True)
        self.put("sys/bus/pci/drivers_probe", "")
        self.put("proc/sys/kernel/random/boot_id", "boot-1\n")
        self.put("proc/1/mountinfo", "22 1 0:20 / / rw - tmpfs tmpfs rw\n")
        self.put("proc/swaps", "Filename Type Size Used Priority\n")
        self.put(
            "proc/net/route", "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
        )
        self.roots = Roots(
            root / "sys", root / "proc", root / "dev", root / "udev", (str(root / "ids"),), self.write
        )
        if vfio:
            self.load("vfio-pci")
        for spec in specs:
            self._make(spec)

    # Files

    def put(self, path: str, text: str) -> Path:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        return place

    def link(self, path: str, target: Path) -> None:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)

    def load(self, driver: str) -> None:
        for name in ("bind", "unbind"):
            self.put(f"sys/bus/pci/drivers/{driver}/{name}", "")

    def device(self, address: str) -> Path:
        """Below /sys/devices, behind its bridges."""
        parents = []
        spec = self.specs[address]
        while spec.parent:
            parents.append(spec.parent)
            spec = self.specs[spec.parent]
        return self.root.joinpath("sys/devices/pci0000:00", *reversed(parents), address)

    def _make(self, spec: Spec) -> None:
        path = self.device(spec.address)
        path.mkdir(parents=True, exist_ok=True)
        vendor, _, device = spec.ids.partition(":")
        files = {
            "vendor": f"0x{vendor}\n",
            "device": f"0x{device}\n",
            "class": f"0x{spec.kind}\n",
            "driver_override": "(null)\n",
            "uevent": "",
            **spec.extra,
        }
        if spec.resets:
            files |= {"reset": "", "reset_method": f"{spec.resets}\n"}
        for name, text in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text)
        (self.root / "sys/bus/pci/devices" / spec.address).symlink_to(path)
        if spec.group is not None:
            group = self.root / f"sys/kernel/iommu_groups/{spec.group}"
            group.mkdir(parents=True, exist_ok=True)
            (path / "iommu_group").symlink_to(group)
        if spec.driver:
            self._bind(spec.address, spec.driver)

    def add_block(self, name: str, address: str, *, number: str = "8:0", holders: str = "") -> None:
        path = self.device(address) / "block" / name
        path.mkdir(parents=True)
        (path / "dev").write_text(f"{number}\n")
        (path / "holders").mkdir()
        if holders:
            (path / "holders" / holders).touch()
        self.link(f"sys/class/block/{name}", path)

    def add_link(self, name: str, address: str, state: str = "up", upper: str = "") -> None:
        path = self.device(address) / "net" / name
        path.mkdir(parents=True)
        (path / "operstate").write_text(f"{state}\n")
        (path / "device").symlink_to(self.device(address))
        if upper:
            (path / f"upper_{upper}").symlink_to(path)
        self.link(f"sys/class/net/{name}", path)

    def add_default_route(self, link: str) -> None:
        with (self.root / "proc/net/route").open("a") as file:
            file.write(f"{link} 00000000 0102A8C0 0003 0 0 100 00000000 0 0 0\n")

    # What is so

    def driver(self, address: str) -> str:
        link = self.device(address) / "driver"
        return link.readlink().name if link.is_symlink() else ""

    def override(self, address: str) -> str:
        text = (self.device(address) / "driver_override").read_text().strip()
        return "" if text == "(null)" else text

    def snapshot(self) -> dict[str, tuple[str, str]]:
        return {address: (self.driver(address), self.override(address)) for address in self.specs}

    def node(self, group: int) -> Path:
        return self.root / f"dev/vfio/{group}"

    # The kernel

    def write(self, path: Path, text: str) -> None:
        at = len(self.writes)
        self.writes.append((str(path.relative_to(self.root / "sys")), text))
        if self.fail_at == at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        name, folder = path.name, path.parent
        if name == "driver_override":
            path.write_text(f"{text or '(null)'}\n")
        elif name == "unbind":
            if self.driver(text) != folder.name:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            self._unbind(text)
        elif name == "bind":
            if self.override(text) not in ("", folder.name):
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            self._bind(text, folder.name)
        elif name == "drivers_probe":
            wanted = self.override(text) or self.specs[text].wants
            loaded = (self.root / "sys/bus/pci/drivers" / wanted).is_dir() if wanted else False
            if loaded and not self.driver(text) and text not in self.stubborn:
                self._bind(text, wanted)
        elif name in ("reset", "reset_subordinate") and path.read_text() == "broken":
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    def _bind(self, address: str, driver: str) -> None:
        self.load(driver)
        (self.device(address) / "driver").symlink_to(self.root / "sys/bus/pci/drivers" / driver)
        group = self.specs[address].group
        if driver == "vfio-pci" and group is not None:
            self.node(group).touch(0o600)

    def _unbind(self, address: str) -> None:
        (self.device(address) / "driver").unlink()
        group = self.specs[address].group
        members = [spec.address for spec in self.specs.values() if spec.group == group]
        if group is not None and "vfio-pci" not in [self.driver(member) for member in members]:
            self.node(group).unlink(missing_ok=True)


NIC = "0000:01:00.0"


def lone_nic(root: Path, **changes: object) -> PciTree:
    """An e1000e alone in its group behind a root port that is in the same group, beside a chipset."""
    port = Spec("0000:00:02.0", "060400", "8086:3420", driver="pcieport", group=2, resets="pm")
    nic = Spec(NIC, driver="e1000e", wants="e1000e", group=2, parent=port.address)
    for name, value in changes.items():
        setattr(nic, name, value)
    return PciTree(root, port, nic, *chipset())


def chipset() -> tuple[Spec, ...]:
    return (
        Spec("0000:00:1f.0", "060100", "8086:2918", driver="lpc_ich", group=4, resets=""),
        Spec("0000:00:1f.2", "010601", "8086:2922", driver="ahci", wants="ahci", group=4, resets="flr"),
        Spec("0000:00:1f.3", "0c0500", "8086:2930", driver="i801_smbus", wants="i801_smbus", group=4),
    )
