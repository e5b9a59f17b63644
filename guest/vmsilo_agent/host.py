"""What the connections of an agent share, as they see it.

The server is the one that has it; a connection calls nothing else of the server.
"""

import socket
from typing import TYPE_CHECKING, Protocol

from vmsilo_agent.cgroup import CgroupTree
from vmsilo_agent.loop import Loop

try:  # `hmac` would bring OpenSSL into a process that stays
    from _operator import _compare_digest as compare_digest
except ImportError:  # private, so it may go
    from hmac import compare_digest  # type: ignore[no-redef,assignment,unused-ignore] # the same function

if TYPE_CHECKING:
    from vmsilo_agent.connection import Connection

__all__ = ["Host", "compare_digest"]


class Host(Protocol):
    """What a connection needs to know of the agent."""

    loop: Loop
    secret: str
    user: str
    tree: CgroupTree | None
    nofile: tuple[int, int]
    console: str

    def power_off(self) -> None: ...
    def connection_authenticated(self, connection: "Connection") -> None: ...
    def connection_closed(self, connection: "Connection") -> None: ...
    def forward(self, kind: int, port: int, sock: socket.socket) -> None: ...
