"""vmsilo disk: the disks of VMs, made larger, and what a VM keeps removed. One D-Bus call each."""

import re

from vmsilo.bus import Bus, check_known, is_interactive
from vmsilo.errors import UsageError, printable
from vmsilo.lifecycle import POLKIT_WAIT
from vmsilo.names import check_name
from vmsilo.options import parse_options
from vmsilo.place import Place
from vmsilo.tables import print_json, print_table, print_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

USAGE = """\
Usage: vmsilo disk list [--json] [VM]
       vmsilo disk grow VM DISK SIZE
       vmsilo disk remove VM persist

  list    the disks of a VM, or of all: id, size, what they take of the host's disk, file
  grow    make a disk larger, while its VM runs or not; never smaller. SIZE is a number with
          M, G or T, such as 20G. A mounted ext4, btrfs or xfs grows with it
  remove  remove what `persist` kept of a VM, which must not run: for ever

Exit status: 0 done, 1 failed, 2 wrong command line.
"""
HEADINGS = ("VM", "DISK", "SIZE", "ON HOST", "STATE", "MOUNT", "FILE")
COUNTS = {"list": (0, 1), "grow": (3, 3), "remove": (2, 2)}
UNITS = {"M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
DISK_WAIT = 60  # seconds


def main(argv: list[str], place: Place) -> int:
    options, rest = parse_options(argv, ("--json", "--help", "-h"), ())
    if not argv or "--help" in options or "-h" in options:
        print_text(USAGE)
        return 0
    command, arguments = (rest[0], rest[1:]) if rest else ("", [])
    if command not in COUNTS:
        raise UsageError(f"unknown command 'disk {printable(command, 60)}'", "vmsilo disk --help")
    fewest, most = COUNTS[command]
    if not fewest <= len(arguments) <= most:
        raise UsageError(f"wrong number of arguments for vmsilo disk {command}", "vmsilo disk --help")
    if "--json" in options and command != "list":
        raise UsageError(f"vmsilo disk {command} takes no --json")
    name = check_name(arguments[0]) if arguments else ""
    size = parse_size(arguments[2]) if command == "grow" else 0
    bus = Bus(place, interactive=command != "list" and is_interactive())
    try:
        if name and command != "remove":  # what a VM kept may outlast its file
            check_known(bus, name, place)
        if command == "list":
            (listed,) = bus.call("ListDisks", "s", (name,))
            disks = [{key: value for key, (_signature, value) in disk.items()} for disk in listed]
            _show(disks, as_json="--json" in options)
        elif command == "grow":
            bus.call("GrowDisk", "sst", (name, arguments[1], size), wait=DISK_WAIT + POLKIT_WAIT)
        else:
            bus.call("RemoveDisk", "ss", (name, arguments[1]), wait=DISK_WAIT + POLKIT_WAIT)
    finally:
        bus.close()
    return 0


def parse_size(text: str) -> int:
    """Bytes of "20G"."""
    found = re.fullmatch(r"([1-9][0-9]{0,9})([MGT])(?:iB)?", text)
    if found is None:
        raise UsageError(f"'{printable(text, 40)}' is not a size such as 20G", "vmsilo disk --help")
    return int(found[1]) * UNITS[found[2]]


def shown_size(size: int) -> str:
    for unit in ("T", "G", "M"):
        if size >= UNITS[unit]:
            return f"{size / UNITS[unit]:.3g}{unit}"
    return f"{(size + 1023) // 1024}K" if size else "0"


def _show(disks: "list[dict[str, Any]]", *, as_json: bool) -> None:
    if as_json:
        print_json(disks)
        return
    if not disks:
        print_text("No VM has a disk beside its root.\n")
        return
    rows = [HEADINGS, *(_row(disk) for disk in disks)]
    print_table(rows)


def _row(disk: "dict[str, Any]") -> tuple[str, ...]:
    state = printable(disk.get("State") or "-", 80) + (", read-only" if disk.get("Readonly") else "")
    sizes = (shown_size(int(disk.get(key) or 0)) for key in ("Size", "Allocated"))
    names = (printable(disk.get(key) or "-", 40) for key in ("Vm", "Id"))
    return (*names, *sizes, state, printable(disk.get("Mount") or "-"), printable(disk.get("Path") or "-"))
