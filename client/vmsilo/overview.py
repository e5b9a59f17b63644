"""vmsilo: lists VMs for people and for programs, and hands other work to the programs that do it."""

import os
import time

from vmsilo.bus import Bus, check_known
from vmsilo.errors import ClientError, UsageError, printable
from vmsilo.names import check_name
from vmsilo.options import parse_options
from vmsilo.place import Place
from vmsilo.tables import align, join, print_json, print_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

USAGE = """\
Usage: vmsilo COMMAND [ARGUMENT]...

  list [--json]           the VMs: state, VMM, memory, CPUs, time since start
  status [--json] [NAME]  the same; everything about one VM
  memory NAME [SIZE]      a VM's memory, and a change of it; see vmsilo memory --help
  check [--json]          check the configuration
  image ...               the images of VMs and their versions; see vmsilo image --help
  pci ...                 the PCI devices of the host; see vmsilo pci --help
  usb ...                 USB devices of this computer in VMs; see vmsilo usb --help
  network ...             interfaces of running VMs; see vmsilo network --help
  disk ...                the disks of VMs, made larger; see vmsilo disk --help
  version                 print the version
  help                    this text

Exit status: 0 done, 1 failed, 2 wrong command line; status NAME: 3 if the VM does not run.
"""
HEADINGS = ("NAME", "STATE", "VMM", "MEMORY", "CPUS", "UPTIME", "NOTE")
STATE_COLOURS = {"running": "32", "starting": "33", "stopping": "33", "failed": "31", "broken": "31"}
NOT_RUNNING = 3  # as systemctl status has it


def main(argv: list[str], place: Place) -> int:
    command, arguments = (argv[0], argv[1:]) if argv else ("help", [])
    if command in ("help", "--help", "-h"):
        print_text(USAGE)
        return 0
    if command in ("version", "--version"):
        print_text(f"vmsilo {_version(place)}\n")
        return 0
    if command == "image":
        from vmsilo.image import main as main_image

        return main_image(arguments, place)
    if command == "check":
        return _become(f"{place.libdir}/bin/vmsilo-{command}", arguments)
    if command == "memory":
        from vmsilo import memory

        return memory.main(arguments, place)
    if command == "pci":
        from vmsilo.pci import main as main_pci

        return main_pci(arguments, place)
    if command == "usb":
        from vmsilo.usb import main as main_usb

        return main_usb(arguments, place)
    if command == "network":
        from vmsilo.network import main as main_network

        return main_network(arguments, place)
    if command == "disk":
        from vmsilo.disk import main as main_disk

        return main_disk(arguments, place)
    if command not in ("list", "status"):
        raise UsageError(f"unknown command '{printable(command, 60)}'", "vmsilo help")
    options, rest = parse_options(arguments, ("--json", "--help", "-h"), ())
    if "--help" in options or "-h" in options:
        print_text(USAGE)
        return 0
    if len(rest) > (command == "status"):
        raise UsageError(f"vmsilo {command} takes no more arguments")
    as_json = "--json" in options
    return (
        _show_vm(check_name(rest[0]), place, as_json=as_json) if rest else _show_all(place, as_json=as_json)
    )


def _become(path: str, arguments: list[str]) -> int:
    try:
        os.execv(path, [path, *arguments])
    except OSError as exc:
        raise ClientError(f"cannot execute {path}: {exc.strerror}") from exc


def _version(place: Place) -> str:
    path = f"{place.libdir}/VERSION"
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 - pathlib is not needed elsewhere
            return printable(file.read(100))
    except OSError as exc:
        raise ClientError(f"cannot read {path}: {exc.strerror}") from exc


def _fetch(name: str | None, place: Place) -> "list[dict[str, Any]]":
    bus = Bus(place)
    try:
        if name is None:
            return bus.find_vms()
        return [check_known(bus, name, place) | {"Network": bus.find_network(name)}]
    finally:
        bus.close()


def _show_all(place: Place, *, as_json: bool) -> int:
    vms = _fetch(None, place)
    if as_json:
        print_json(vms)
        return 0
    if not vms:
        print_text("No VMs are configured.\n")
        return 0
    rows = [HEADINGS, *(_row(vm) for vm in sorted(vms, key=lambda vm: str(vm.get("Name"))))]
    coloured = os.isatty(1)
    lines = []
    for row, cells in zip(rows, align(rows), strict=True):
        if coloured and row[1] in STATE_COLOURS:
            cells[1] = f"\x1b[{STATE_COLOURS[row[1]]}m{cells[1]}\x1b[0m"
        lines.append(join(cells))
    print_text("\n".join(lines) + "\n")
    return 0


def _row(vm: "dict[str, Any]") -> tuple[str, ...]:
    return (
        printable(vm.get("Name", ""), 40),
        printable(vm.get("State", ""), 20),
        printable(vm.get("Vmm") or "-", 30),
        f"{_number(vm.get('Memory'))} MiB",
        str(_number(vm.get("Cpus"))),
        _uptime(vm),
        _note(vm),
    )


def _note(vm: "dict[str, Any]") -> str:
    notes = []
    if vm.get("Template"):
        notes.append(f"disposable of {printable(vm['Template'], 40)}")
    if vm.get("RestartNeeded"):
        notes.append("restart needed")
    problems = vm.get("Problems") or []
    if problems:
        notes.append(
            printable(problems[0], 100) + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
        )
    if vm.get("State") == "failed" and vm.get("LastResult"):
        notes.append(printable(vm["LastResult"], 100))
        if vm.get("Status"):
            notes.append(printable(vm["Status"], 100))
    elif vm.get("State") == "starting" and vm.get("Status"):
        notes.append(printable(vm["Status"], 100))
    return "; ".join(notes)


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _uptime(vm: "dict[str, Any]") -> str:
    since = _number(vm.get("Since"))
    if vm.get("State") != "running" or not since:
        return "-"
    seconds = max(int(time.time() - since / 1e6), 0)
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _show_vm(name: str, place: Place, *, as_json: bool) -> int:
    (vm,) = _fetch(name, place)
    if as_json:
        print_json(vm)
    else:
        shown = {key: _text(key, vm) for key in vm if key not in ("Problems", "Network", "RestartReasons")}
        width = max(len(key) for key in shown)
        lines = [f"{printable(key, 40).ljust(width)}  {value}".rstrip() for key, value in shown.items()]
        if vm.get("RestartNeeded"):
            reasons = [printable(reason, 200) for reason in vm.get("RestartReasons") or []]
            lines.append(f"restart needed: {'; '.join(reasons) or 'what it was started with has changed'}")
        lines += [f"problem: {printable(problem)}" for problem in vm.get("Problems") or []]
        lines += [_interface(port) for port in vm["Network"]]
        print_text("\n".join(lines) + "\n")
    return 0 if vm.get("State") == "running" else NOT_RUNNING


def _interface(port: "dict[str, Any]") -> str:
    counted = f"{_number(port.get('Received'))} bytes received, {_number(port.get('Sent'))} sent"
    if _number(port.get("Denied")):
        counted += f", {_number(port.get('Denied'))} packets denied"
    from vmsilo.network import describe_dropped

    if dropped := describe_dropped(port):
        counted += f", dropped: {dropped}"
    tap = printable(port.get("Tap", ""), 20)
    if port.get("Network"):
        tap += f", {printable(port.get('Type', ''), 20)} {printable(port['Network'], 40)}"
    place = f"{printable(port.get('Interface', ''), 20)} ({tap})"
    line = f"network {place}: {printable(port.get('State', ''), 20)}, {counted}"
    return f"{line}; {printable(port['Problem'])}" if port.get("Problem") else line


def _text(key: str, vm: "dict[str, Any]") -> str:
    value = vm[key]
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "Memory":
        return f"{_number(value)} MiB"
    if key == "Since":
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(_number(value) / 1e6)) if value else "-"
        return f"{stamp} ({_uptime(vm)})" if vm.get("State") == "running" else stamp
    if isinstance(value, list | tuple):
        return " ".join(printable(item, 100) for item in value) or "-"
    return printable(value)
