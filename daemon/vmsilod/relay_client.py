"""vmsilod's end of the relay's control socket: registers VMs, asks for connections, hears of guest
readiness.

Called by the lifecycle on the GLib loop. It never reads a byte that a guest wrote: statuses arrive already
checked by the relay.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmsilod.errors import Failed
from vmsilod.order_socket import Answer, OrderSocket

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SOCKET_PATH = "/run/vmsilo/relay.sock"


class RelayClient:
    """The orders that the relay knows; see OrderSocket for the connection."""

    def __init__(
        self,
        on_event: Callable[[dict[str, Any]], None],
        on_connected: Callable[[], None],
        path: str = SOCKET_PATH,
    ) -> None:
        self._orders = OrderSocket("vmsilo-relayd", path, on_event, on_connected)
        self.open = self._orders.open
        self.close = self._orders.close
        self._ask = self._orders.ask
        self._order = self._orders.order

    async def add(self, registration: dict[str, Any], fds: Sequence[int]) -> None:
        await self._order({"op": "add", **registration}, fds)

    async def listen_vsock(self, listener: int) -> None:
        await self._order({"op": "listen-vsock"}, [listener])

    async def remove(self, name: str, generation: str) -> None:
        await self._order({"op": "remove", "name": name, "generation": generation})

    async def find_vms(self) -> dict[str, Any]:
        return await self._order({"op": "list"})

    async def connect(self, name: str, role: str) -> int:
        """A descriptor connected to the guest agent, authenticated for the role; the caller owns it."""
        return take_one(await self._ask({"op": "connect", "name": name, "role": role}))

    async def dial(self, name: str, port: int) -> int:
        """A descriptor connected to a vsock port of the guest, nothing said yet; the caller owns it."""
        return take_one(await self._ask({"op": "dial", "name": name, "port": port}))

    async def forward(self, name: str, generation: str, link: int) -> None:
        """The relay's end of what the VM's forwarder asks it by; the descriptor stays the caller's."""
        await self._order({"op": "forward", "name": name, "generation": generation}, [link])

    async def power_off(self, name: str) -> None:
        await self._order({"op": "poweroff", "name": name})


def take_one(answer: Answer) -> int:
    """The answer's descriptor, which the taker owns."""
    _, fds = answer
    if len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise Failed("the relay answered without a descriptor")
    return fds[0]
