"""The open connections of one VM's forwards, their bounds, and the bridges on this process's loop.

Built once by `main`. Ports take a place here for each connection before they do anything for it.
"""

from __future__ import annotations

from vmsilo_relay.journal import ERROR, INFO
from vmsilo_relay.loop import READ, WRITE
from vmsilo_wire.bridge import Bridge

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmsilo_forward.context import Context
    from vmsilo_forward.link import Link


class Traffic:
    def __init__(self, context: Context, link: Link, name: str) -> None:
        self.context = context
        self.link = link
        self.name = name
        self._spent: dict[str, int] = {}
        self._bridges: set[Bridge] = set()

    def enter(self, port: str) -> bool:
        """Take a place for a connection of this port; False where there is none."""
        limits = self.context.limits
        used = self._spent.get(port, 0)
        if used >= limits.connections_per_port or sum(self._spent.values()) >= limits.connections:
            self.log(f"{port}: too many connections, one is refused")
            return False
        self._spent[port] = used + 1
        return True

    def leave(self, port: str) -> None:
        self._spent[port] -= 1

    def log(self, text: str) -> None:
        self.context.journal.log(INFO, self.name, text)

    def copy(self, plain: socket.socket, framed: socket.socket, ended: Callable[[], None]) -> None:
        """Take over both sockets until one of them is done with."""

        def watch(sock: socket.socket, read: bool, write: bool) -> None:  # noqa: FBT001 as Bridge calls it
            loop = self.context.loop
            events = (READ if read else 0) | (WRITE if write else 0)
            if not events:
                loop.forget(sock.fileno())
                return
            turn = bridge.on_plain if sock is plain else bridge.on_framed

            def call(mask: int) -> None:
                turn(readable=bool(mask & READ), writable=bool(mask & WRITE))

            loop.watch(sock.fileno(), events, call, fail)

        def fail(error: Exception) -> None:
            self.context.journal.log(ERROR, self.name, f"copying failed: {error!r}")
            bridge.close("internal error")

        def finish(_reason: str) -> None:
            self._bridges.discard(bridge)
            ended()

        bridge = Bridge(plain, framed, watch, finish, in_guest=False)
        self._bridges.add(bridge)
        bridge.start()

    def break_all(self) -> None:
        """The guest that had the other ends is gone."""
        for bridge in tuple(self._bridges):
            bridge.close("the guest began anew")
