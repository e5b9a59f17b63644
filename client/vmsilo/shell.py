"""vm-shell: a VM's console on the user's terminal, and the other ways to a prompt in it.

Reads the command line and hands over: the console to `console`, a command with a terminal to `run`, ssh to
`ssh`. Owns nothing.
"""

import os

from vmsilo.errors import ClientError, UsageError
from vmsilo.names import check_name
from vmsilo.options import parse_escapes, parse_options
from vmsilo.place import Place

POLKIT_WAIT = 120
LOGIN_SHELL = ("/bin/sh", "-c", 'exec "${SHELL:-/bin/sh}" -l')  # SHELL is the guest user's own

CONSOLE_FLAGS = ("--read-only", "--take", "--no-history", "--log", "--start")
COMMAND_FLAGS = ("--exec", "--ssh", "--root")
HELP_FLAGS = ("--help", "-h")

USAGE = """\
Usage: vm-shell [--read-only|--take] [--no-history] [--start] NAME
       vm-shell --log NAME
       vm-shell --exec|--ssh [--root] NAME [COMMAND [ARGUMENT]...]
The console of the VM NAME on this terminal. Ctrl-] leaves; the VM goes on.

  --read-only      look only: keys are not sent
  --take           write, even if another vm-shell does
  --no-history     only what comes from now on
  --start          start the VM if it does not run
  --log            print what the console has shown, also of a VM that has ended
  --exec           not the console: COMMAND (a login shell) as with vm-run
  --ssh            not the console: COMMAND (a login shell) through ssh
  --root           with --exec or --ssh, as root of the guest (asks polkit)
  --escapes WHICH  what may reach a terminal: colour (default) or all
  --help           this text

Exit status: 0 left, or the VM ended; 1 failed; 2 wrong command line; 128+N signal N.
With --exec and --ssh the command's own.
"""


def main(argv: list[str], place: Place) -> int:
    flags = (*CONSOLE_FLAGS, *COMMAND_FLAGS, *HELP_FLAGS)
    options, rest = parse_options(argv, flags, ("--escapes",), interleaved=False)
    runs_command = "--exec" in options or "--ssh" in options
    if not runs_command:
        options, rest = parse_options(argv, (*CONSOLE_FLAGS, *HELP_FLAGS, "--root"), ("--escapes",))
    if "--help" in options or "-h" in options:
        return _print_usage()
    _check_together(options)
    if not rest:
        raise UsageError("no VM named")
    name = check_name(rest[0])
    if "--ssh" in options:
        from vmsilo.ssh import main as run_ssh

        return run_ssh(name, root="--root" in options, command=rest[1:], place=place)
    if runs_command:
        from vmsilo.run import main as run_command

        words = ["--root"] if "--root" in options else []
        words += ["--escapes", options["--escapes"][-1]] if "--escapes" in options else []
        return run_command([*words, name, "--", *(rest[1:] or LOGIN_SHELL)], place)
    if len(rest) > 1:
        raise UsageError("one VM at a time; a command needs --exec or --ssh before the VM's name")
    return _attach(name, options, place)


def _attach(name: str, options: dict[str, list[str]], place: Place) -> int:
    from vmsilo.console import Wish, print_log, run_console

    escapes = parse_escapes(options)
    if "--log" in options:
        return print_log(name, place, escapes=escapes)
    if "--start" in options:
        _start(name, place)
    write = "no" if "--read-only" in options else "take" if "--take" in options else "ask"
    return run_console(
        name, place, Wish(history="--no-history" not in options, write=write, escapes=escapes)
    )


def _start(name: str, place: Place) -> None:
    from vmsilo.bus import START_WAIT, Bus, check_known, is_interactive

    bus = Bus(place, interactive=is_interactive())
    try:
        check_known(bus, name, place)
        bus.call("Start", "sa{sv}", (name, {"wait": ("b", False)}), wait=START_WAIT + POLKIT_WAIT)
    finally:
        bus.close()


def _check_together(options: dict[str, list[str]]) -> None:
    chosen = [flag for flag in ("--log", "--exec", "--ssh") if flag in options]
    if len(chosen) > 1:
        raise UsageError(f"{chosen[0]} and {chosen[1]} exclude each other")
    if "--read-only" in options and "--take" in options:
        raise UsageError("--read-only and --take exclude each other")
    if chosen:
        for flag in CONSOLE_FLAGS:
            if flag in options and flag != chosen[0]:
                raise UsageError(f"{flag} has no meaning with {chosen[0]}")
    if "--root" in options and chosen[:1] not in (["--exec"], ["--ssh"]):
        raise UsageError("--root needs --exec or --ssh; the console is the guest's own login")
    if "--ssh" in options and "--escapes" in options:
        raise UsageError("--escapes has no meaning with --ssh, which passes everything")


def _print_usage() -> int:
    try:
        os.write(1, USAGE.encode())
    except OSError as exc:
        raise ClientError(f"cannot write to standard output: {exc.strerror}") from exc
    return 0
