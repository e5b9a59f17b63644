"""The PCI functions of this host as sysfs shows them: identity, driver, IOMMU group, resets.

`read_topology` reads below the given roots and changes nothing; the planning takes its result. Called in a
worker, and by vmsilo-pci-claim at boot. A function that vanishes while it is read is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmsilod.pci.address import find_addresses

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vmsilod.pci.roots import Roots

VFIO_DRIVER = "vfio-pci"
BRIDGE = 0x0604
DISPLAY = 0x03  # base class
_TEXT_MAX = 4096

# Where no pci.ids is installed. Class codes: PCI Code and ID Assignment Specification.
_CLASSES = {
    0x0100: "SCSI controller",
    0x0101: "IDE controller",
    0x0106: "SATA controller",
    0x0107: "SAS controller",
    0x0108: "NVMe controller",
    0x0200: "Ethernet controller",
    0x0280: "Network controller",
    0x0300: "VGA controller",
    0x0302: "3D controller",
    0x0380: "Display controller",
    0x0401: "Audio device",
    0x0403: "Audio device",
    0x0500: "RAM memory",
    0x0600: "Host bridge",
    0x0601: "ISA bridge",
    0x0604: "PCI bridge",
    0x0780: "Communication controller",
    0x0C03: "USB controller",
    0x0C05: "SMBus controller",
}


@dataclass(frozen=True)
class Function:
    """`resets`: the kernel's ways to reset it alone, none if it has to be reset together with its bus.
    `parent`: the bridge that it is behind, "" on a root bus. `virtual_functions`: how many it has made.
    """

    address: str
    class_code: int = 0
    vendor: str = ""
    device: str = ""
    name: str = ""
    driver: str = ""
    override: str = ""
    group: int | None = None
    resets: tuple[str, ...] = ()
    parent: str = ""
    boot_vga: bool = False
    virtual_functions: int = 0

    @property
    def is_bridge(self) -> bool:
        return self.class_code == BRIDGE

    @property
    def is_display(self) -> bool:
        return self.class_code >> 8 == DISPLAY

    @property
    def with_host(self) -> bool:
        """A driver of the host has it; pci-stub's whole purpose is that none does."""
        return self.driver not in ("", VFIO_DRIVER, "pci-stub")

    @property
    def shown(self) -> str:
        """In a message, where several have to fit."""
        name = self.name.rpartition(" [")[0] or self.name
        return f"{self.address} ({name}{f', driver {self.driver}' if self.driver else ''})"


@dataclass(frozen=True)
class Topology:
    functions: Mapping[str, Function] = field(default_factory=dict)
    forged_interrupts: bool = False
    """A device could send any interrupt to the host, and VFIO refuses to start because of that."""

    @property
    def has_iommu(self) -> bool:
        return any(function.group is not None for function in self.functions.values())

    def find_group(self, group: int | None) -> list[Function]:
        if group is None:
            return []
        return [function for function in self.functions.values() if function.group == group]

    def find_bus(self, function: Function) -> list[Function]:
        """What shares the function's bus, itself included."""
        bus = function.address.rpartition(":")[0]
        return [other for address, other in self.functions.items() if address.rpartition(":")[0] == bus]


def read_topology(roots: Roots) -> Topology:
    found = {}
    folder = roots.sys / "bus/pci/devices"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        function = _read_function(path)
        if function is not None:
            found[function.address] = function
    names = _find_names(found.values(), roots)
    named = {address: _named(function, names) for address, function in found.items()}
    return Topology(named, forged_interrupts=_find_forged_interrupts(roots))


def _find_forged_interrupts(roots: Roots) -> bool:
    """x86 without interrupt remapping, whose interrupts have other names, unless its risk was accepted."""
    accepted = read_text(roots.sys / "module/vfio_iommu_type1/parameters/allow_unsafe_interrupts")
    if accepted != "N":
        return False
    try:
        lines = (roots.proc / "interrupts").read_text(errors="replace")
    except OSError:
        return False
    return "IO-APIC" in lines and "IR-" not in lines


def read_text(path: Path) -> str:
    """The stripped content of an attribute, "" if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_TEXT_MAX).decode("utf-8", "replace").strip("\n\0 ")
    except OSError:
        return ""


def read_driver(path: Path) -> str:
    """The driver of a device's directory, "" without one."""
    try:
        return (path / "driver").readlink().name
    except OSError:
        return ""


def _read_function(path: Path) -> Function | None:
    if not read_text(path / "vendor"):
        return None
    override = read_text(path / "driver_override")
    ancestors = find_addresses(str(path.resolve().parent))
    return Function(
        address=path.name,
        class_code=_read_number(path / "class") >> 8,
        vendor=read_text(path / "vendor").removeprefix("0x"),
        device=read_text(path / "device").removeprefix("0x"),
        driver=read_driver(path),
        override="" if override == "(null)" else override,
        group=_read_group(path),
        resets=_read_resets(path),
        parent=ancestors[-1] if ancestors else "",
        boot_vga=read_text(path / "boot_vga") == "1",
        virtual_functions=_read_number(path / "sriov_numvfs"),
    )


def _read_number(path: Path) -> int:
    try:
        return int(read_text(path) or "0", 0)
    except ValueError:
        return 0


def _read_group(path: Path) -> int | None:
    try:
        return int((path / "iommu_group").readlink().name)
    except (OSError, ValueError):
        return None


def _read_resets(path: Path) -> tuple[str, ...]:
    """`reset` exists where the function can be reset at all; `reset_method` (Linux 5.15) names the ways."""
    if not (path / "reset").exists():
        return ()
    return tuple(read_text(path / "reset_method").split()) or ("unknown",)


def _find_names(functions: Iterable[Function], roots: Roots) -> dict[tuple[str, str], str]:
    """(vendor, device) -> names of pci.ids; (vendor, "") -> the vendor's alone."""
    wanted = {(function.vendor, function.device) for function in functions}
    vendors = {vendor for vendor, _ in wanted}
    names: dict[tuple[str, str], str] = {}
    for file in roots.ids:
        try:
            text = Path(file).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        vendor, name = "", ""
        for line in text.splitlines():
            if line[:1].isalnum():
                if line.startswith("C "):
                    break  # the list of classes
                vendor, name = line[:4], line[6:]
                names[vendor, ""] = name
            elif vendor in vendors and line[:1] == "\t" and (vendor, line[1:5]) in wanted:
                names[vendor, line[1:5]] = f"{name} {line[7:]}"
        break
    return names


def _named(function: Function, names: Mapping[tuple[str, str], str]) -> Function:
    ids = f"[{function.vendor}:{function.device}]"
    kind = _CLASSES.get(function.class_code, f"class {function.class_code:04x}")
    full = names.get((function.vendor, function.device)) or names.get((function.vendor, ""), "")
    # Whoever makes pci.ids does not make our terminals.
    text = "".join(c for c in (f"{full} {kind}" if full else kind) if c.isprintable())
    return replace(function, name=f"{text} {ids}")
