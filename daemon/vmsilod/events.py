"""Reading what the kernel tells over netlink, for the watches of USB and of the network.

Called on the loop when a socket is readable; the sockets are the watches'.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

log = logging.getLogger(__name__)

EVENT_MAX = 65536  # bytes
READS_PER_TURN = 256


def drain(sock: socket.socket, concerns: Callable[[bytes], bool]) -> bool:
    """Whether one of the events that have come concerns us; lost ones (a full queue) count as one."""
    seen = False
    for _ in range(READS_PER_TURN):
        try:
            event, sender = sock.recvfrom(EVENT_MAX)
        except BlockingIOError:
            break
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                seen = True
                continue
            log.error("cannot read the kernel's events: %s", error.strerror)
            break
        # Port 0 is the kernel; a process with CAP_NET_ADMIN could send too.
        if sender[0] == 0 and concerns(event):
            seen = True
    return seen
