"""vmsilo memory: shows a VM's memory, or asks its guest to have more or less of it."""

import time

from vmsilo.bus import Bus, check_known, is_interactive
from vmsilo.errors import UsageError, printable
from vmsilo.names import check_name
from vmsilo.options import parse_options
from vmsilo.place import Place
from vmsilo.tables import print_json, print_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

USAGE = """\
Usage: vmsilo memory [--json] NAME [SIZE]
Shows the memory of the VM NAME. With SIZE (MiB, or a number with M or G), asks its guest
to have that much: between memory and memory_max of its configuration. More memory is there
in a moment; a guest gives memory back only as far as it can, and what came of it is shown.

Exit status: 0 done, 1 failed or not (fully) done by the guest, 2 wrong command line.
"""
PATIENCE = 10.0  # seconds for a guest
INTERVAL = 0.2
POLKIT_WAIT = 120
SIZE_MOST = 16 * 1024 * 1024  # MiB
LABELS = (
    ("configured", "memory"),
    ("maximum", "memory_max"),
    ("requested", "asked for"),
    ("actual", "now"),
)


def main(argv: list[str], place: Place) -> int:
    options, rest = parse_options(argv, ("--json", "--help", "-h"), ())
    if "--help" in options or "-h" in options:
        print_text(USAGE)
        return 0
    if len(rest) not in (1, 2):
        raise UsageError("no VM named" if not rest else "vmsilo memory takes NAME and SIZE")
    name = check_name(rest[0])
    size = parse_size(rest[1]) if len(rest) == 2 else None
    bus = Bus(place, interactive=is_interactive())
    try:
        check_known(bus, name, place)
        if size is None:
            (memory,) = bus.call("GetMemory", "s", (name,))
        else:
            (memory,) = bus.call("SetMemory", "su", (name, size), wait=POLKIT_WAIT)
            memory = _await_guest(bus, name, memory)
    finally:
        bus.close()
    _show(memory, as_json="--json" in options)
    if size is None or memory.get("actual") == size:
        return 0
    if "--json" not in options:
        verb = "gave back" if memory.get("actual", 0) > size else "took"
        print_text(f"The guest {verb} only a part of it so far; it may go on.\n")
    return 1


def parse_size(text: str) -> int:
    """MiB."""
    number, unit = (text[:-1], text[-1:]) if text[-1:] in ("M", "G") else (text, "M")
    known = number.isascii() and number.isdigit() and len(number) < 9
    size = int(number) * (1024 if unit == "G" else 1) if known else 0
    if not 0 < size <= SIZE_MOST:
        raise UsageError(f"'{printable(text, 40)}' is not a size", "such as 2048, 2048M or 2G")
    return size


def _await_guest(bus: Bus, name: str, memory: "dict[str, Any]") -> "dict[str, Any]":
    """The guest works by itself, and a VMM tells nobody when it is done."""
    deadline = time.monotonic() + PATIENCE
    while memory.get("actual") != memory.get("requested") and time.monotonic() < deadline:
        time.sleep(INTERVAL)
        (memory,) = bus.call("GetMemory", "s", (name,))
    return memory


def _show(memory: "dict[str, Any]", *, as_json: bool) -> None:
    if as_json:
        print_json(memory)
        return
    rows = [(label, memory[key]) for key, label in LABELS if isinstance(memory.get(key), int)]
    width = max(len(label) for label, _ in rows)
    print_text("".join(f"{label.ljust(width)}  {size} MiB\n" for label, size in rows))
