"""Recorded USB devices as a sysfs tree below a directory of a test's own.

The files, names and contents are those of a Debian 13 machine (kernel 6.12); numbers and strings are chosen
by the test. Writing to `unbind` and `drivers_probe` does nothing but leave the text there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

STORAGE = ("08", "06", "50")
KEYBOARD = ("03", "01", "01")
MOUSE = ("03", "01", "02")
AUDIO = ("01", "01", "00")
HUB = ("09", "00", "00")


@dataclass
class Plugged:
    """One device as it is written; strings are bytes because a device may send any."""

    name: str
    devnum: int
    ids: str = "0951:1666"
    serial: bytes | None = None
    title: tuple[bytes, bytes] = (b"Kingston", b"DataTraveler 3.0")
    device_class: str = "00"
    interfaces: tuple[tuple[str, str, str], ...] = (STORAGE,)
    drivers: tuple[str, ...] = ("usb-storage",)
    made: int = field(default=-1)
    """How many interfaces the kernel has made so far; -1 for all."""


class UsbTree:
    """`root` is what a module takes for /sys, `dev` for /dev."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "sys"
        self.dev = directory / "dev"
        self._bus = self.root / "bus" / "usb"
        self._devices = self.root / "devices" / "pci0000:00" / "0000:00:13.0" / "usb1"
        (self._bus / "devices").mkdir(parents=True)
        (self._bus / "drivers_probe").write_text("")
        self._write_root_hub()

    def plug(self, plugged: Plugged) -> Path:
        """The device's directory."""
        bus = plugged.name.partition("-")[0]
        vendor, product = plugged.ids.split(":")
        attributes: dict[str, bytes] = {
            "busnum": bus.encode(),
            "devnum": str(plugged.devnum).encode(),
            "idVendor": vendor.encode(),
            "idProduct": product.encode(),
            "bDeviceClass": plugged.device_class.encode(),
            "bNumInterfaces": f"{len(plugged.interfaces):2d}".encode(),
            "speed": b"480",
            "manufacturer": plugged.title[0],
            "product": plugged.title[1],
        }
        if plugged.serial is not None:
            attributes["serial"] = plugged.serial
        path = self._write(self._devices / plugged.name, attributes)
        made = len(plugged.interfaces) if plugged.made < 0 else plugged.made
        for number, codes in enumerate(plugged.interfaces[:made]):
            driver = plugged.drivers[number] if number < len(plugged.drivers) else ""
            self._write_interface(path / f"{plugged.name}:1.{number}", number, codes, driver)
        return path

    def unplug(self, name: str) -> None:
        (self._bus / "devices" / name).unlink()

    def add_disk(self, name: str, disk: str, number: str = "8:16") -> Path:
        """A disk with one partition behind the first interface."""
        folder = self._devices / name / f"{name}:1.0" / "host6/target6:0:0/6:0:0:0/block" / disk
        for path, dev in ((folder, number), (folder / f"{disk}1", number[:-1] + str(int(number[-1]) + 1))):
            (path / "holders").mkdir(parents=True)
            (path / "dev").write_text(f"{dev}\n")
        (folder / f"{disk}1" / "partition").write_text("1\n")
        return folder

    def written(self, driver: str) -> str:
        return (self._bus / "drivers" / driver / "unbind").read_text()

    def probed(self) -> str:
        return (self._bus / "drivers_probe").read_text()

    def _write_root_hub(self) -> None:
        attributes = {"busnum": b"1", "devnum": b"1", "idVendor": b"1d6b", "idProduct": b"0002"}
        self._write(self._devices, {**attributes, "bDeviceClass": b"09", "bNumInterfaces": b" 1"})

    def _write(self, path: Path, attributes: dict[str, bytes]) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        for name, content in attributes.items():
            (path / name).write_bytes(content + b"\n")
        link = self._bus / "devices" / path.name
        if not link.is_symlink():
            link.symlink_to(path)
        return path

    def _write_interface(self, path: Path, number: int, codes: tuple[str, str, str], driver: str) -> None:
        attributes = {"bInterfaceNumber": f"{number:02x}".encode()}
        names = ("bInterfaceClass", "bInterfaceSubClass", "bInterfaceProtocol")
        attributes |= {name: code.encode() for name, code in zip(names, codes, strict=True)}
        self._write(path, attributes)
        if driver:
            folder = self._bus / "drivers" / driver
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "unbind").touch()
            (path / "driver").unlink(missing_ok=True)
            (path / "driver").symlink_to(folder)
