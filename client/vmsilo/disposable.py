"""The disposable for one vm-run: asked for over D-Bus, and held by that connection.

Called by run.py before it connects to the VM. However the program ends, the kernel closes the connection,
and vmsilod takes the disposable away.
"""

import os

from vmsilo.bus import Bus, is_interactive
from vmsilo.errors import ClientError, UsageError, printable, write_stderr
from vmsilo.names import check_name
from vmsilo.place import Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmsilo.run import Request

CREATE_WAIT = 90 + 120  # seconds; the second part is for a person to type a password
ONLY_HERE = ("--ro", "--network", "--template", "--allow-home")


def create(request: "Request", options: dict[str, list[str]], place: Place) -> Bus:
    """Puts the name of the new VM, and with --here the directory, into the request. Whoever closes what is
    returned gives the disposable up.
    """
    _check(options)
    directory = _open_here() if "--here" in options else None
    bus = Bus(place, interactive=is_interactive())
    try:
        if directory is None:
            asked: dict[str, tuple[str, Any]] = {}
            if "--name" in options:
                asked["name"] = ("s", check_name(options["--name"][-1]))
            call: tuple[str, str, tuple[Any, ...]] = (
                *("CreateDisposable", "sa{sv}"),
                (request.name, asked),
            )
        else:
            fd, path = directory
            asked = {"path": ("s", path), "network": ("b", "--network" in options)}
            asked |= {"ro": ("b", "--ro" in options), "home": ("b", "--allow-home" in options)}
            call = ("CreateDisposableHere", "sha{sv}", (request.name, fd, asked))
            request.cwd = request.cwd or path
        name, notes = bus.call(*call, wait=CREATE_WAIT)
    except BaseException:
        bus.close()
        raise
    finally:
        if directory is not None:
            os.close(directory[0])
    request.name = check_name(name)
    for note in notes:
        write_stderr(f"vm-run: {request.name}: {printable(note)}\n")
    return bus


def _check(options: dict[str, list[str]]) -> None:
    here, disposable = "--here" in options, "--disposable" in options
    if here and disposable:
        raise UsageError("--here makes a disposable by itself: leave out --disposable")
    stray = [option for option in ONLY_HERE if option in options and not here]
    if stray:
        raise UsageError(f"{stray[0]} is for --here")
    if "--name" in options and not disposable:
        raise UsageError("--name is for --disposable")
    if "--detach" in options:
        raise UsageError("a disposable ends with its command, which therefore cannot be left alone")
    if "--no-start" in options:
        raise UsageError("a disposable never runs before its command")


def _open_here() -> tuple[int, str]:
    try:
        path = os.getcwd()  # noqa: PTH109 - pathlib is not needed elsewhere
        path.encode()
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), path
    except OSError as exc:
        raise ClientError(f"the working directory cannot be opened: {exc.strerror}") from exc
    except UnicodeEncodeError as exc:
        raise ClientError("the path of the working directory is not UTF-8") from exc
