"""The command line of relayd and consoled, and their control socket.

Called by `main` of each. systemd gives socket and directory; options are for tests and for starting by hand.
"""

from __future__ import annotations

import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsilo_relay.context import Limits


class Options:
    """Only tests and daemons started by hand need any: systemd gives socket and directory."""

    def __init__(self, environ: dict[str, str], limits: Limits) -> None:
        self.control = ""
        self.state = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
        self.admins = {0}
        self.limits = limits


def parse_options(arguments: list[str], environ: dict[str, str], limits: Limits) -> Options:
    """Raises ValueError. Written out because argparse would cost more memory than the VM table."""
    options = Options(environ, limits)
    pairs = list(zip(arguments[::2], arguments[1::2], strict=False))
    if len(arguments) % 2:
        raise ValueError(f"{arguments[-1]}: value missing or option unknown")
    for option, value in pairs:
        if option == "--control":
            options.control = value
        elif option == "--state":
            options.state = value
        elif option == "--admin-uid":
            options.admins.add(int(value))
        elif option == "--limit":
            options.limits.override(value)
        else:
            raise ValueError(f"unknown option {option}")
    if not options.state:
        raise ValueError("no state directory: neither RUNTIME_DIRECTORY nor --state")
    return options


def find_control(inherited: list[tuple[str, socket.socket]], path: str) -> socket.socket | None:
    """Take the control listener out of `inherited`, or bind it at `path`."""
    found = None
    for entry in tuple(inherited):
        if entry[0] == "control":
            inherited.remove(entry)
            found = entry[1]
    if found is None and path:
        found = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        found.bind(path)
        os.chmod(path, 0o600)  # noqa: PTH101 pathlib would cost 2 MB for this one call
        found.listen(64)
    return found
