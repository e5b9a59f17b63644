"""vm-start and vm-stop: one D-Bus call each."""

import os
import time

from vmsilo.bus import START_WAIT, Bus, check_known, is_interactive
from vmsilo.command_socket import Progress
from vmsilo.errors import ClientError, UsageError
from vmsilo.names import check_name
from vmsilo.options import parse_options, parse_seconds
from vmsilo.place import Place

STOP_WAIT = 60
STOP_MOST = 3600
POLKIT_WAIT = 120

START_USAGE = """\
Usage: vm-start [--wait] NAME
Starts the VM NAME. With --wait, returns when the guest is ready.

Exit status: 0 started, 1 failed, 2 wrong command line.
"""
STOP_USAGE = """\
Usage: vm-stop [--force] [--timeout SECONDS] NAME
Asks the guest of the VM NAME to shut down, and waits for it.

  --force            end the VM at once; the guest loses what it has not written
  --timeout SECONDS  how long the guest may take before the VM is ended (at most its stop_timeout)

Exit status: 0 stopped, 1 failed, 2 wrong command line.
"""


def main_start(argv: list[str], place: Place) -> int:
    options, rest = parse_options(argv, ("--wait", "--help", "-h"), ())
    if _wants_help(options, START_USAGE):
        return 0
    name = _one_name(rest)
    wait = "--wait" in options
    progress = Progress("vm-start", name, time.monotonic(), place)
    bus = Bus(place, interactive=is_interactive())
    try:
        check_known(bus, name, place)
        tick = progress.show if os.isatty(2) else None
        bus.call("Start", "sa{sv}", (name, {"wait": ("b", wait)}), wait=START_WAIT + POLKIT_WAIT, tick=tick)
    finally:
        progress.erase()
        bus.close()
    return 0


def main_stop(argv: list[str], place: Place) -> int:
    options, rest = parse_options(argv, ("--force", "--help", "-h"), ("--timeout",))
    if _wants_help(options, STOP_USAGE):
        return 0
    name = _one_name(rest)
    if "--force" in options and "--timeout" in options:
        raise UsageError("--force does not wait, so it takes no --timeout")
    body: dict[str, tuple[str, int]] = {}
    wait = STOP_WAIT
    if "--timeout" in options:
        wait = parse_seconds("--timeout", options["--timeout"][-1], most=STOP_MOST)
        body["timeout"] = ("u", wait)
    bus = Bus(place, interactive=is_interactive())
    try:
        check_known(bus, name, place)
        if "--force" in options:
            bus.call("Kill", "s", (name,), wait=STOP_WAIT + POLKIT_WAIT)
        else:
            bus.call("Stop", "sa{sv}", (name, body), wait=wait + STOP_WAIT + POLKIT_WAIT)
    finally:
        bus.close()
    return 0


def _wants_help(options: dict[str, list[str]], usage: str) -> bool:
    if "--help" not in options and "-h" not in options:
        return False
    try:
        os.write(1, usage.encode())
    except OSError as exc:
        raise ClientError(f"cannot write to standard output: {exc.strerror}") from exc
    return True


def _one_name(rest: list[str]) -> str:
    if len(rest) != 1:
        raise UsageError("no VM named" if not rest else "one VM at a time")
    return check_name(rest[0])
