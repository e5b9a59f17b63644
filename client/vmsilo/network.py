"""vmsilo network: interfaces of a VM, given to it and taken away while it runs. One D-Bus call each."""

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
Usage: vmsilo network list [--json] VM
       vmsilo network attach VM INTERFACE
       vmsilo network detach VM INTERFACE

  list    the interfaces of a VM: state, bytes, packets that its rules denied, and others that they
          dropped, by why; "detached": the file has the interface and the running VM has it not
  attach  give a running VM an interface that was added to its file, or that it was detached from
  detach  take an interface away from a running VM; a restart of the VM gives it what its file says

INTERFACE is the NAME of [network.interfaces.NAME] in the VM's file. Not with crosvm, nor with
QEMU's machine "microvm".

Exit status: 0 done, 1 failed, 2 wrong command line.
"""
HEADINGS = ("INTERFACE", "TAP", "MAC", "STATE", "RECEIVED", "SENT", "DENIED", "NOTE")
METHODS = {"attach": "AttachInterface", "detach": "DetachInterface"}
DEVICE_WAIT = 60  # seconds; a guest may take fifteen to give an interface up


def main(argv: list[str], place: Place) -> int:
    options, rest = parse_options(argv, ("--json", "--help", "-h"), ())
    if not argv or "--help" in options or "-h" in options:
        print_text(USAGE)
        return 0
    command, arguments = (rest[0], rest[1:]) if rest else ("", [])
    if command != "list" and command not in METHODS:
        raise UsageError(f"unknown command 'network {printable(command, 60)}'", "vmsilo network --help")
    if len(arguments) != (1 if command == "list" else 2):
        raise UsageError(f"wrong number of arguments for vmsilo network {command}", "vmsilo network --help")
    if "--json" in options and command != "list":
        raise UsageError(f"vmsilo network {command} takes no --json")
    name = check_name(arguments[0])
    bus = Bus(place, interactive=command != "list" and is_interactive())
    try:
        check_known(bus, name, place)
        if command == "list":
            _show(bus.find_network(name), name, as_json="--json" in options)
        else:
            bus.call(METHODS[command], "ss", (name, arguments[1]), wait=DEVICE_WAIT + POLKIT_WAIT)
    finally:
        bus.close()
    return 0


def _show(ports: "list[dict[str, Any]]", name: str, *, as_json: bool) -> None:
    if as_json:
        print_json(ports)
        return
    if not ports:
        print_text(f"VM '{name}' has no network interface.\n")
        return
    rows = [HEADINGS, *(_row(port) for port in ports)]
    print_table(rows)


def _row(port: "dict[str, Any]") -> tuple[str, ...]:
    texts = (printable(port.get(key) or "-", 20) for key in ("Interface", "Tap", "Mac", "State"))
    numbers = (str(port.get(key) or 0) for key in ("Received", "Sent", "Denied"))
    dropped = describe_dropped(port)
    notes = (printable(port.get("Problem") or "", 200), f"dropped: {dropped}" if dropped else "")
    note = "; ".join(filter(None, notes))
    return (*texts, *(printable(number, 20) for number in numbers), note)


def describe_dropped(port: "dict[str, Any]") -> str:
    """What its rules refused but for `Denied`, most first: "12 arp, 3 mac"; "" for nothing."""
    kinds = port.get("Dropped")
    counted = kinds.items() if isinstance(kinds, dict) else ()
    some = [(count, str(kind)) for kind, count in counted if isinstance(count, int) and count > 0]
    return ", ".join(f"{count} {printable(kind, 20)}" for count, kind in sorted(some, reverse=True))
