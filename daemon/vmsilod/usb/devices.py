"""The USB devices of this host, as sysfs shows them.

Called in the worker by the attachments; reads below one root and changes nothing. Every text in it was sent
by a device, so it may be anything: it is cut and made printable here. A device that goes away while it is
read is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SYSFS = Path("/sys")
TEXT_MAX = 126  # characters of a string descriptor: 255 bytes, two of them its head, in UTF-16
READ_MAX = 1024  # bytes

Key = tuple[str, int, int]

_DEVICE_NAME = re.compile(r"[1-9][0-9]*-[1-9][0-9]*(\.[1-9][0-9]*)*")
_ROOT_HUB_NAME = re.compile(r"usb[1-9][0-9]*")
_HUB, _HID, _WIRELESS = 0x09, 0x03, 0xE0
_BOOT_KEYBOARD, _BOOT_MOUSE = (_HID, 1, 1), (_HID, 1, 2)
# https://www.usb.org/defined-class-codes
_KINDS = {
    0x01: "audio",
    0x02: "communication",
    _HID: "input",
    0x06: "camera",
    0x07: "printer",
    0x08: "storage",
    _HUB: "hub",
    0x0B: "smart card",
    0x0E: "video",
    0x11: "billboard",
    _WIRELESS: "wireless",
}


@dataclass(frozen=True)
class UsbInterface:
    """`name` is sysfs' (`1-2:1.0`); `driver` is "" when none is bound, "usbfs" when a program holds it."""

    name: str
    number: int
    kind: tuple[int, int, int]
    driver: str = ""


@dataclass(frozen=True)
class UsbDevice:
    """`name` is sysfs' (`1-2.3`: bus and ports) and stays with the port; `devnum` is new with each
    plugging in until its bus itself goes; `instance`, the inode of its directory, always is. `serial` is
    "" where there is none that could be trusted to be written down.
    """

    name: str
    busnum: int
    devnum: int
    vendor: str
    product: str
    serial: str = ""
    title: str = ""
    instance: int = 0
    device_class: int = 0
    speed: str = ""
    configured: bool = True
    interfaces: tuple[UsbInterface, ...] = ()

    @property
    def is_hub(self) -> bool:
        return self.device_class == _HUB or bool(_ROOT_HUB_NAME.fullmatch(self.name))

    @property
    def ids(self) -> str:
        return f"{self.vendor}:{self.product}" + (f":{self.serial}" if self.serial else "")

    @property
    def key(self) -> Key:
        """Tells this plugging in from any other of this boot."""
        return self.name, self.devnum, self.instance

    @property
    def host_drivers(self) -> tuple[str, ...]:
        drivers = {interface.driver for interface in self.interfaces}
        return tuple(sorted(drivers - {"", "usbfs"}))

    @property
    def kinds(self) -> tuple[str, ...]:
        found = dict.fromkeys(_name_kind(interface.kind) for interface in self.interfaces)
        return tuple(kind for kind in found if kind)


def node_of(device: UsbDevice, dev: Path = Path("/dev")) -> Path:
    return dev / "bus" / "usb" / f"{device.busnum:03d}" / f"{device.devnum:03d}"


def find_devices(sysfs: Path = SYSFS) -> list[UsbDevice]:
    """Everything that is plugged in, hubs included, root hubs not; in the order of ports."""
    root = sysfs / "bus" / "usb" / "devices"
    try:
        names = sorted(path.name for path in root.iterdir())
    except OSError:
        return []  # a kernel without USB
    found = [_read_device(root / name) for name in names if _DEVICE_NAME.fullmatch(name)]
    return sorted(
        (device for device in found if device is not None), key=lambda device: port_order(device.name)
    )


def find_device(name: str, sysfs: Path = SYSFS) -> UsbDevice | None:
    """The device at this port now."""
    if not _DEVICE_NAME.fullmatch(name):
        return None
    return _read_device(sysfs / "bus" / "usb" / "devices" / name)


def is_port_name(text: str) -> bool:
    return bool(_DEVICE_NAME.fullmatch(text))


def port_order(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.split(r"[-.]", name))


def _read_device(path: Path) -> UsbDevice | None:
    try:
        busnum, devnum = int(_read(path / "busnum")), int(_read(path / "devnum"))
        vendor, product = _read_hex(path / "idVendor", 4), _read_hex(path / "idProduct", 4)
        device_class = int(_read_hex(path / "bDeviceClass", 2), 16)
        instance = path.stat().st_ino
    except (OSError, ValueError):
        return None  # on its way in or out
    names = (clean_text(_read_optional(path / name)) for name in ("manufacturer", "product"))
    interfaces = _read_interfaces(path)
    expected = _read_optional(path / "bNumInterfaces").strip()
    return UsbDevice(
        name=path.name,
        busnum=busnum,
        devnum=devnum,
        vendor=vendor,
        product=product,
        serial=clean_serial(_read_optional(path / "serial")),
        title=" ".join(name for name in names if name)[:TEXT_MAX],
        instance=instance,
        device_class=device_class,
        speed=clean_text(_read_optional(path / "speed"))[:16],
        # The kernel makes the device first, then its interfaces.
        configured=expected.isdecimal() and int(expected) == len(interfaces) > 0,
        interfaces=interfaces,
    )


def _read_interfaces(path: Path) -> tuple[UsbInterface, ...]:
    found = []
    for child in sorted(path.glob(f"{path.name}:*")):
        try:
            number = int(_read_hex(child / "bInterfaceNumber", 2), 16)
            codes = [
                int(_read_hex(child / name, 2), 16)
                for name in ("bInterfaceClass", "bInterfaceSubClass", "bInterfaceProtocol")
            ]
        except (OSError, ValueError):
            continue
        link = child / "driver"
        driver = link.readlink().name if link.is_symlink() else ""
        found.append(UsbInterface(child.name, number, (codes[0], codes[1], codes[2]), driver))
    return tuple(found)


def clean_text(untrusted_text: str) -> str:
    """One printable line of bounded length."""
    shown = "".join(char if char.isprintable() else "?" for char in untrusted_text.strip("\n"))
    return shown.strip()[:TEXT_MAX]


def clean_serial(untrusted_text: str) -> str:
    """The serial number if it is plain ASCII; "" otherwise, because two odd ones might look the same."""
    text = untrusted_text.removesuffix("\n")
    return text if is_serial(text) else ""


def is_serial(text: str) -> bool:
    """What a rule may name: 1 to 126 printable ASCII characters, no blank at either end."""
    plain = text.isascii() and text.isprintable() and text == text.strip()
    return plain and 1 <= len(text) <= TEXT_MAX


def _name_kind(kind: tuple[int, int, int]) -> str:
    if kind == _BOOT_KEYBOARD:
        return "keyboard"
    if kind == _BOOT_MOUSE:
        return "mouse"
    return _KINDS.get(kind[0], "")


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(READ_MAX).decode("utf-8", "replace")


def _read_optional(path: Path) -> str:
    try:
        return _read(path)
    except OSError:
        return ""


def _read_hex(path: Path, digits: int) -> str:
    text = _read(path).strip().lower()
    if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", text):
        raise ValueError(f"{path} does not hold {digits} hexadecimal digits")
    return text
