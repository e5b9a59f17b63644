"""vmsilo-relayd: `main` builds every part in the order of dependence, restores the VMs, and runs the loop.

SIGTERM ends it at once, on purpose without cleaning up: listeners stay in systemd's descriptor store and
the VM table in the state directory, and the next start goes on from there.
"""

from __future__ import annotations

import os
import signal
import sys

from vmsilo_relay.context import Context, Limits
from vmsilo_relay.control import ControlSocket
from vmsilo_relay.journal import ERROR, INFO, Journal
from vmsilo_relay.loop import Loop
from vmsilo_relay.options import find_control, parse_options
from vmsilo_relay.relay import Relay
from vmsilo_relay.systemd import Notifier, take_listen_fds

USAGE = "usage: vmsilo-relayd [--control PATH] [--state DIRECTORY] [--admin-uid UID] [--limit KEY=NUMBER]..."


def main(argv: list[str]) -> int:
    """Run until SIGTERM; `argv` is without the program's name."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(0))
    environ = os.environ.copy()
    journal = Journal()
    try:
        options = parse_options(argv, environ, Limits())
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
