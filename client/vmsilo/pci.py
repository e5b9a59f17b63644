"""vmsilo pci: the PCI devices of the host, and who has them. One D-Bus call each."""

from vmsilo.bus import Bus, is_interactive
from vmsilo.errors import UsageError, printable
from vmsilo.options import parse_options
from vmsilo.place import Place
from vmsilo.tables import print_json, print_table, print_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

USAGE = """\
Usage: vmsilo pci COMMAND [ARGUMENT]...

  list [--json] [--all]  the devices: address, IOMMU group, state, driver, name; --all: bridges too
  claim ADDRESS          take a device from the host's driver, so that a VM may have it
  release ADDRESS        give it back to the host's driver

States: host (a driver of the host has it), free (nobody), claimed (ready for a VM), used (by a VM),
tainted (was used by a VM and cannot be reset). Addresses are like 01:00.0 or 0000:01:00.0.

Exit status: 0 done, 1 failed, 2 wrong command line.
"""
HEADINGS = ("ADDRESS", "GROUP", "STATE", "VM", "DRIVER", "RESET", "NAME", "NOTE")
WAIT = 60  # seconds; a driver of the host may take its time to let go
POLKIT_WAIT = 120


def main(argv: list[str], place: Place) -> int:
    options, rest = parse_options(argv, ("--json", "--all", "--help", "-h"), ())
    if "--help" in options or "-h" in options or not rest:
        print_text(USAGE)
        return 0 if options else 2
    command, arguments = rest[0], rest[1:]
    if command == "list" and not arguments:
        return _list(place, as_json="--json" in options, bridges="--all" in options)
    if command not in ("claim", "release"):
        raise UsageError(f"unknown command 'pci {printable(' '.join(rest), 60)}'", "vmsilo pci --help")
    if len(arguments) != 1 or options:
        raise UsageError(f"vmsilo pci {command} takes one address", "vmsilo pci list")
    bus = Bus(place, interactive=is_interactive())
    try:
        method = "ClaimPci" if command == "claim" else "ReleasePci"
        reply = bus.call(method, "s", (arguments[0],), wait=WAIT + POLKIT_WAIT)
    finally:
        bus.close()
    if command == "release":
        driver = printable(reply[0], 60)
        print_text(f"{printable(arguments[0], 20)}: {f'driver {driver}' if driver else 'no driver'}\n")
    return 0


def _list(place: Place, *, as_json: bool, bridges: bool) -> int:
    bus = Bus(place)
    try:
        (found,) = bus.call("ListPci", wait=WAIT)
    finally:
        bus.close()
    devices = [{key: value for key, (_signature, value) in device.items()} for device in found]
    if as_json:
        print_json(devices)
        return 0
    shown = [device for device in devices if bridges or device.get("Class") != "0604"]
    rows = [HEADINGS, *(_row(device) for device in shown)]
    print_table(rows)
    return 0


def _row(device: "dict[str, Any]") -> tuple[str, ...]:
    group = device.get("Group")
    state = str(device.get("State", ""))
    notes = ["isolated"] if device.get("Isolated") else []
    notes += [str(device["Note"])] if device.get("Note") else []
    return (
        printable(device.get("Address", ""), 20),
        str(group) if isinstance(group, int) and group >= 0 else "-",
        printable(state, 20),
        printable(device.get("Vm") or "-", 40),
        printable(device.get("Driver") or "-", 40),
        printable(",".join(map(str, device.get("Resets") or ())) or "-", 40),
        printable(device.get("Name", ""), 120),
        printable("; ".join(notes), 200),
    )
