"""vmsilo-relayd: `main` builds every part in the order of dependence, restores the VMs, and runs the loop.

SIGTERM ends it at once, on purpose without cleaning up: listeners stay in systemd's descriptor store and
the VM table in the state directory, and the next start goes on from there.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from vmsilo_relay.context import Context, Limits
from vmsilo_relay.control import ControlSocket
from vmsilo_relay.journal import ERROR, INFO, Journal
from vmsilo_relay.loop import Loop
from vmsilo_relay.relay import Relay
from vmsilo_relay.systemd import Notifier, take_listen_fds

USAGE = "usage: vmsilo-relayd [--control PATH] [--state DIRECTORY] [--admin-uid UID] [--limit KEY=NUMBER]..."


class Options:
    """Only tests and hand-started relays need any: systemd gives socket and directory."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.control = ""
        self.state = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
        self.admins = {0}
        self.limits = Limits()


def parse_options(arguments: list[str], environ: dict[str, str]) -> Options:
    """Raises ValueError. Written out because argparse would cost more memory than the VM table."""
    options = Options(environ)
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


def main(argv: list[str]) -> int:
    """Run until SIGTERM; `argv` is without the program's name."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(0))
    environ = os.environ.copy()
    journal = Journal()
    try:
        options = parse_options(argv, environ)
    except ValueError as error:
        journal.log(ERROR, "relayd", f"{error}; {USAGE}")
        return 2
    os.umask(0o077)
    inherited = take_listen_fds(environ)
    try:
        control = find_control(inherited, options.control)
    except OSError as error:
        journal.log(ERROR, "relayd", f"can't listen at {options.control}: {error}")
        return 1
    if control is None:
        journal.log(ERROR, "relayd", "no control socket: neither from systemd nor by --control")
        return 2
    loop = Loop()
    context = Context(loop, journal, options.limits)
    notifier = Notifier(loop, journal, environ)
    relay = Relay(context, notifier, options.state)
    relay.restore(inherited)
    ControlSocket(context, relay, control, frozenset(options.admins))
    notifier.ready()
    journal.log(INFO, "relayd", f"ready, {len(relay.vms)} VMs restored")
    loop.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
