"""vmsilo usb: the USB devices of the host, and which VM has which. One D-Bus call each."""

from vmsilo.bus import Bus, check_known, is_interactive
from vmsilo.errors import ClientError, UsageError, printable
from vmsilo.lifecycle import POLKIT_WAIT
from vmsilo.names import check_name
from vmsilo.options import parse_options
from vmsilo.place import Place
from vmsilo.tables import print_json, print_table, print_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

USAGE = """\
Usage: vmsilo usb list [--json]
       vmsilo usb attach VM DEVICE
       vmsilo usb detach [VM] DEVICE
       vmsilo usb release DEVICE

  list     the USB devices of this computer
  attach   plug a device into a running VM; until the VM stops it comes back when it is plugged in again
  detach   take it out of the VM again; this computer does not use it by itself after that
  release  let this computer use a device that no VM has

DEVICE is the address that `list` shows (1-2.3: bus and ports), or VID:PID, or VID:PID:SERIAL.

Exit status: 0 done, 1 failed, 2 wrong command line.
"""
HEADINGS = ("ADDRESS", "ID", "SERIAL", "NAME", "HOST DRIVER", "VM", "NOTE")
DEVICE_WAIT = 60  # seconds; a device may take ten to answer its VMM
COUNTS = {"attach": (2, 2), "detach": (1, 2), "release": (1, 1), "list": (0, 0)}


def main(argv: list[str], place: Place) -> int:
    options, rest = parse_options(argv, ("--json", "--help", "-h"), ())
    if not argv or "--help" in options or "-h" in options:
        print_text(USAGE)
        return 0
    command, arguments = (rest[0], rest[1:]) if rest else ("", [])
    if command not in COUNTS:
        raise UsageError(f"unknown command 'usb {printable(command, 60)}'", "vmsilo usb --help")
    least, most = COUNTS[command]
    if not least <= len(arguments) <= most:
        raise UsageError(f"wrong number of arguments for vmsilo usb {command}", "vmsilo usb --help")
    if "--json" in options and command != "list":
        raise UsageError(f"vmsilo usb {command} takes no --json")
    bus = Bus(place, interactive=command != "list" and is_interactive())
    try:
        if command == "list":
            _show(find_devices(bus), as_json="--json" in options)
        else:
            _change(bus, command, arguments, place)
    finally:
        bus.close()
    return 0


def find_devices(bus: Bus) -> "list[dict[str, Any]]":
    """What ListUsb says, without D-Bus types."""
    (devices,) = bus.call("ListUsb", wait=DEVICE_WAIT)
    return [{key: value for key, (_signature, value) in device.items()} for device in devices]


def _change(bus: Bus, command: str, arguments: list[str], place: Place) -> None:
    *name, device = arguments
    if name:
        check_known(bus, check_name(name[0]), place)
    wait = DEVICE_WAIT + POLKIT_WAIT
    if command == "attach":
        bus.call("AttachUsb", "ss", (name[0], device), wait=wait)
    elif command == "release":
        bus.call("ReleaseUsb", "s", (device,), wait=wait)
    else:
        vm = name[0] if name else _find_holder(find_devices(bus), device)
        bus.call("DetachUsb", "ss", (vm, device), wait=wait)


def _find_holder(devices: "list[dict[str, Any]]", address: str) -> str:
    """The one VM that has this device."""
    fitting = [device for device in devices if address.lower() in _addresses(device)]
    holders = {str(device["Vm"]) for device in fitting if device.get("Vm")}
    if len(holders) == 1:
        return check_name(holders.pop())
    shown = printable(address, 60)
    if not holders:
        raise ClientError(f"no VM has a USB device {shown}", "vmsilo usb list")
    named = ", ".join(sorted(printable(device.get("Port", ""), 40) for device in fitting))
    raise ClientError(f"{shown} names several devices: {named}", "name one by its address")


def _addresses(device: "dict[str, Any]") -> set[str]:
    ids = f"{device.get('Vendor')}:{device.get('Product')}"
    serial = f"{ids}:{device.get('Serial')}" if device.get("Serial") else ids
    return {str(device.get("Port")), ids, serial.lower()}


def _show(devices: "list[dict[str, Any]]", *, as_json: bool) -> None:
    if as_json:
        print_json(devices)
        return
    if not devices:
        print_text("No USB devices are plugged in.\n")
        return
    rows = [HEADINGS, *(_row(device) for device in devices)]
    print_table(rows)


def _row(device: "dict[str, Any]") -> tuple[str, ...]:
    vm = printable(device.get("Vm") or "", 40)
    return (
        printable(device.get("Port", ""), 40),
        f"{printable(device.get('Vendor', ''), 4)}:{printable(device.get('Product', ''), 4)}",
        printable(device.get("Serial") or "-", 30),
        printable(device.get("Title") or _kinds(device) or "-", 40),
        printable(" ".join(device.get("HostDrivers") or []) or "-", 40),
        vm or "-",
        _note(device),
    )


def _kinds(device: "dict[str, Any]") -> str:
    return ", ".join(str(kind) for kind in device.get("Kinds") or [])


def _note(device: "dict[str, Any]") -> str:
    notes = ["hub"] if device.get("Hub") else [_kinds(device)] if device.get("Title") else []
    if device.get("Obstacle") and not device.get("Vm"):
        notes.append(printable(device["Obstacle"], 100))
    if device.get("Rule"):
        notes.append(f"rule of {printable(device['Rule'], 100)}")
    return "; ".join(printable(note, 120) for note in notes if note)
