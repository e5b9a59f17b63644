"""vm-run: a command in a VM, as if it were one of the host's.

Its warm path is what start-up time is measured on.
"""

import os
import time

from vmsilo_wire.payload import Spawn, encode_spawn, is_env_name

from vmsilo.command_socket import WAIT_MOST, dial
from vmsilo.errors import (
    ClientError,
    LostError,
    SocketClosedError,
    StoppedMeanwhileError,
    UsageError,
    printable,
)
from vmsilo.names import check_name
from vmsilo.options import parse_escapes, parse_options, parse_seconds
from vmsilo.place import Place
from vmsilo.session import Wish, run_session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PROGRAM = "vm-run"
POLKIT_WAIT = 120  # seconds for a person to type a password
DISPOSABLE_FLAGS = ("--disposable", "--here", "--ro", "--network", "--allow-home")
LOCALE_OTHER = ("LANG", "LANGUAGE")

USAGE = """\
Usage: vm-run [OPTION]... NAME [--] COMMAND [ARGUMENT]...
       vm-run [OPTION]... --disposable TEMPLATE [--] COMMAND [ARGUMENT]...
       vm-run [OPTION]... --here [--] COMMAND [ARGUMENT]...
Runs COMMAND in the VM NAME, which is started if it does not run; or in a new VM that is made of the
VM TEMPLATE and ends with the command, nothing of which remains.

  --disposable       in a disposable of the VM that is named
  --name NAME        of the disposable; further commands with the same name join it
  --here             in a disposable that has the working directory, and no network
  --ro               with --here: the command cannot change the directory
  --network          with --here: with the network of its template
  --template NAME    with --here: not of the default template but of this VM
  --allow-home       with --here: even if that is all of your home directory
  --root             as root of the guest (asks polkit)
  --detach           do not wait for the command's end
  --no-start         fail if the VM does not run
  --cwd DIR          working directory in the guest
  --env KEY=VALUE    add to the command's environment; can be repeated
  --escapes WHICH    what may reach a terminal: colour (default) or all
  --timeout SECONDS  how long to wait for a VM that has to start (its start_timeout)
  --help             this text

Exit status: the command's own; 128+N if signal N ended it; 125 if vm-run itself failed,
126 if COMMAND can't be executed, 127 if it was not found. At a terminal, Enter ~ . leaves.
"""


class Request:
    """A checked command line."""

    __slots__ = ("argv", "cwd", "detach", "env", "escapes", "name", "no_start", "root", "wait")

    def __init__(self, options: dict[str, list[str]], rest: list[str]) -> None:
        if "--here" in options:
            rest.insert(0, options.get("--template", [""])[-1])
        if rest[1:2] == ["--"]:
            del rest[1]
        if not rest:
            raise UsageError("no VM named")
        self.name = check_name(rest[0]) if rest[0] or "--here" not in options else ""
        if len(rest) < 2 or not rest[1]:
            raise UsageError("no command given")
        self.argv = tuple(_wire_text(a) for a in rest[1:])
        self.root = "--root" in options
        self.detach = "--detach" in options
        self.no_start = "--no-start" in options
        self.escapes = parse_escapes(options)
        self.cwd = _wire_text(options["--cwd"][-1]) if "--cwd" in options else None
        self.wait: int | None = None  # seconds; as the VM is configured
        if "--timeout" in options:
            self.wait = parse_seconds("--timeout", options["--timeout"][-1], most=WAIT_MOST)
        self.env = _parse_env(options.get("--env", []))


def main(argv: list[str], place: Place) -> int:
    options, rest = parse_options(
        argv,
        ("--root", "--detach", "--no-start", "--help", "-h", *DISPOSABLE_FLAGS),
        ("--cwd", "--env", "--escapes", "--timeout", "--name", "--template"),
        interleaved=False,
    )
    if "--help" in options or "-h" in options:
        os.write(1, USAGE.encode())
        return 0
    request = Request(options, rest)
    pty = None if request.detach else _find_pty()
    env = {**_inherited(), **request.env}
    if pty is not None:
        # What the filter would remove is not asked for: programs then print plain lines.
        env.setdefault("TERM", os.environ.get("TERM", "dumb") if request.escapes else "dumb")
    holder = None
    if options.keys() & {*DISPOSABLE_FLAGS, "--name", "--template"}:
        from vmsilo.disposable import create

        holder = create(request, options, place)
    wish = Wish(pty=pty is not None, detach=request.detach, escapes=request.escapes)
    try:
        return _run(request, env, pty, place, wish)
    except LostError as lost:
        from vmsilo.diagnose import explain_loss

        raise explain_loss(request.name, place, lost) from lost
    finally:
        if holder is not None:
            holder.close()


def _run(
    request: Request, env: dict[str, str], pty: tuple[int, int] | None, place: Place, wish: Wish
) -> int:
    if request.root:
        return run_session(_open_as_root(request, env, pty, place), b"", wish)
    spawn = Spawn(request.argv, cwd=request.cwd, env=env, pty=pty, detach=request.detach)
    try:
        first = encode_spawn(spawn)
    except ValueError as exc:
        raise ClientError(str(exc)) from exc
    return run_session(_open_as_user(request, place), first, wish)


def _open_as_user(request: Request, place: Place) -> int:
    if request.no_start:
        from vmsilo.diagnose import check_running

        check_running(request.name, place)
    began = time.monotonic()
    try:
        return dial(PROGRAM, request.name, place, wait=request.wait)
    except SocketClosedError as closed:
        from vmsilo.diagnose import explain, explain_loss

        error = explain(request.name, place, closed, began)
        if error is None and isinstance(closed, StoppedMeanwhileError):
            error = explain_loss(request.name, place, closed)
        if error is not None:
            raise error from closed
    return dial(PROGRAM, request.name, place, wait=request.wait)


def _open_as_root(request: Request, env: dict[str, str], pty: tuple[int, int] | None, place: Place) -> int:
    """A connection on which vmsilod has sent the command already."""
    from vmsilo.bus import Bus, is_interactive

    options: dict[str, tuple[str, Any]] = {"root": ("b", True), "env": ("a{ss}", env)}
    if request.detach:
        options["detach"] = ("b", True)
    if request.cwd is not None:
        options["cwd"] = ("s", request.cwd)
    if request.no_start:
        options["no-start"] = ("b", True)
    if pty is not None:
        options["rows"], options["cols"] = ("u", pty[0]), ("u", pty[1])
    try:
        for text in (*request.argv, *env.values(), request.cwd or ""):
            text.encode()
    except UnicodeEncodeError as exc:
        raise ClientError("with --root, arguments and environment have to be UTF-8") from exc
    bus = Bus(place, interactive=is_interactive())
    try:
        wait = (WAIT_MOST if request.wait is None else request.wait) + POLKIT_WAIT
        (stream,) = bus.call("Run", "sasa{sv}", (request.name, list(request.argv), options), wait=wait)
        fd: int = stream.to_raw_fd()
    finally:
        bus.close()
    os.set_blocking(fd, False)
    return fd


def _find_pty() -> tuple[int, int] | None:
    """The terminal's rows and columns if input and output both are one."""
    if not (os.isatty(0) and os.isatty(1)):
        return None
    from vmsilo.terminal import find_size

    return find_size(1) or (24, 80)


def _inherited() -> dict[str, str]:
    """The language; nothing else of the host's environment concerns a guest."""
    found = {}
    for key, value in os.environ.items():
        if (key.startswith("LC_") and is_env_name(key)) or key in LOCALE_OTHER:
            found[key] = _wire_text(value)
    return found


def _parse_env(settings: list[str]) -> dict[str, str]:
    env = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not is_env_name(key):
            raise UsageError(f"--env takes KEY=VALUE, not '{printable(setting, 60)}'")
        env[key] = _wire_text(value)
    return env


def _wire_text(text: str) -> str:
    """An argument's bytes as the wire has them, whatever the locale's encoding is."""
    return os.fsencode(text).decode("utf-8", "surrogateescape")
