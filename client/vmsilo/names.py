"""VM names: which are allowed, which exist, which one was meant.

Reads only the directory of command sockets.
"""

import os

from vmsilo.errors import UsageError, printable
from vmsilo.place import Place

NAME_MAX = 31
SOCKET_SUFFIX = "-command.socket"
CONSOLE_SUFFIX = "-console"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LATER = LETTERS + "0123456789-"


def is_name(text: str) -> bool:
    return 0 < len(text) <= NAME_MAX and text[0] in LETTERS and not text.strip(LATER)


def check_name(untrusted_name: str) -> str:
    """The name itself. Called before any path is made of it."""
    if not is_name(untrusted_name):
        raise UsageError(
            f"'{printable(untrusted_name, 60)}' is not a VM name",
            "a name has 1 to 31 of a-z, 0-9 and -, and starts with a letter",
        )
    return untrusted_name


def socket_path(name: str, place: Place) -> str:
    return f"{place.run_dir}/{check_name(name)}{SOCKET_SUFFIX}"


def console_path(name: str, place: Place) -> str:
    return f"{place.run_dir}/{check_name(name)}{CONSOLE_SUFFIX}"


def list_names(place: Place) -> list[str]:
    """The VMs that have a command socket, sorted."""
    try:
        entries = os.listdir(place.run_dir)  # noqa: PTH208 - pathlib costs more than the whole program
    except OSError:
        return []
    found = [e[: -len(SOCKET_SUFFIX)] for e in entries if e.endswith(SOCKET_SUFFIX)]
    return sorted(n for n in found if is_name(n))


def find_close(name: str, known: list[str]) -> str:
    """A hint that names what was probably meant; empty if nothing is close."""
    import difflib

    close = difflib.get_close_matches(name, known, 3, 0.5)
    if not close:
        return ""
    return "did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
