"""vmsilo-consoled: `main` builds every part in the order of dependence, restores the VMs, runs the loop.

SIGTERM ends it at once, on purpose without cleaning up: listeners, terminals and scroll-backs stay in
systemd's descriptor store and the rest in the state directory, and the next start goes on from there.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from vmsilo_relay.journal import ERROR, INFO, Journal
from vmsilo_relay.loop import Loop
from vmsilo_relay.options import find_control, parse_options
from vmsilo_relay.systemd import Notifier, take_descriptors

from vmsilo_console.context import Context, Limits
from vmsilo_console.control import ControlSocket
from vmsilo_console.table import Consoles

SUBJECT = "consoled"
USAGE = (
    "usage: vmsilo-consoled [--control PATH] [--state DIRECTORY] [--admin-uid UID] [--limit KEY=NUMBER]..."
)


def main(argv: list[str]) -> int:
    """Run until SIGTERM; `argv` is without the program's name."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(0))
    environ = os.environ.copy()
    journal = Journal()
    limits = Limits()
    try:
        options = parse_options(argv, environ, limits)
    except ValueError as error:
        journal.log(ERROR, SUBJECT, f"{error}; {USAGE}")
        return 2
    os.umask(0o077)
    stored = take_descriptors(environ)
    inherited = [(name, socket.socket(fileno=fd)) for name, fd in stored if name == "control"]
    try:
        control = find_control(inherited, options.control)
    except OSError as error:
        journal.log(ERROR, SUBJECT, f"can't listen at {options.control}: {error}")
        return 1
    if control is None:
        journal.log(ERROR, SUBJECT, "no control socket: neither from systemd nor by --control")
        return 2
    loop = Loop()
    context = Context(loop, journal, limits)
    notifier = Notifier(loop, journal, environ, SUBJECT)
    table = Consoles(context, notifier, options.state)
    table.restore([entry for entry in stored if entry[0] != "control"])
    ControlSocket(context, table, control, frozenset(options.admins))
    notifier.ready("Reading consoles")
    journal.log(INFO, SUBJECT, f"ready, {len(table.consoles)} consoles restored")
    loop.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
