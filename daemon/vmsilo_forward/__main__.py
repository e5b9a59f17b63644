"""vmsilo-forward NAME: `main` builds every part in the order of dependence and runs the loop.

SIGTERM ends it at once: the VM is gone or going. After a crash systemd starts it again with the listeners,
which it keeps; the connections that were copied are lost.
"""

from __future__ import annotations

import os
import signal
import sys

from vmsilo_relay.journal import ERROR, INFO, Journal
from vmsilo_relay.loop import Loop
from vmsilo_relay.systemd import Notifier, take_listen_fds

from vmsilo_forward.context import Context, Limits
from vmsilo_forward.link import Link
from vmsilo_forward.order import Order, Question
from vmsilo_forward.ports import GuestPort, HostPort
from vmsilo_forward.traffic import Traffic

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

CONTROL = "/run/vmsilo/control.sock"
USAGE = "usage: vmsilo-forward NAME [--control PATH]"


class Forwarder:
    """Everything that lives as long as the process."""

    def __init__(self, name: str, control: str, environ: dict[str, str]) -> None:
        self.loop = Loop()
        self._context = Context(self.loop, Journal(), Limits())
        self._notifier = Notifier(self.loop, self._context.journal, environ, name)
        self._link = Link(self._context, name)
        self._traffic = Traffic(self._context, self._link, name)
        self._question = Question(self._context, control, name, self._obey)
        self._listeners = take_listen_fds(environ)
        self._host_ports: list[HostPort] = []
        self._guest_ports: list[GuestPort] = []
        self._name = name
        self._begun = False

    def start(self) -> None:
        self._question.has_listeners = bool(self._listeners)
        self._link.on_ready = self._on_ready
        self._link.on_restart = self._on_restart
        self._link.on_lost = self._question.ask
        self._question.ask()

    def _obey(self, order: Order) -> None:
        """The first order says what there is to forward; a later one brings nothing but another link."""
        if not self._begun:
            self._begun = True
            for number, sock in enumerate(order.listeners):
                self._notifier.store(f"listener-{number}", sock.fileno())
            self._question.has_listeners = True
            self._begin(order, [*(sock for _, sock in self._listeners), *order.listeners])
        self._link.use(order.link)

    def _begin(self, order: Order, listeners: list[socket.socket]) -> None:
        named = {sock.getsockname()[:2]: sock for sock in listeners}
        for from_host, address, port, guest in order.forwards:
            if not from_host:
                self._guest_ports.append(GuestPort(self._traffic, (address, port), guest))
                continue
            sock = named.pop((address, port), None)
            if sock is None:
                self._context.journal.log(ERROR, self._name, f"{address} port {port} has no listener")
                continue
            self._host_ports.append(HostPort(self._traffic, sock, f"{address} port {port}", guest))
        self._notifier.ready(f"Forwarding {len(self._host_ports)} ports in, {len(self._guest_ports)} out")
        self._context.journal.log(INFO, self._name, "forwarding")

    def _on_ready(self, ready: bool) -> None:  # noqa: FBT001 as Link calls it
        if ready:
            for host_port in self._host_ports:
                host_port.on_ready()
            for guest_port in self._guest_ports:
                guest_port.on_ready()

    def _on_restart(self) -> None:
        self._traffic.break_all()
        for port in self._guest_ports:
            port.on_restart()


def main(argv: list[str]) -> int:
    """Run until SIGTERM; `argv` is without the program's name."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(0))
    control = argv[2] if len(argv) == 3 and argv[1] == "--control" else CONTROL
    if len(argv) not in (1, 3) or (len(argv) == 3 and argv[1] != "--control"):
        print(USAGE, file=sys.stderr)
        return 2
    forwarder = Forwarder(argv[0], control, os.environ.copy())
    forwarder.start()
    forwarder.loop.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
