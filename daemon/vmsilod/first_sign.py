"""Finds out that a QEMU has got as far as running its guest.

Called by endings.py for each run. QEMU ends with 1 both when it could not make the machine and when the
guest panicked; but its main loop, which answers QMP commands, begins only when the machine is made. Holds
the monitor, which serves one client at a time, no longer than until that moment.
"""

from __future__ import annotations

import json
import socket
import time
from typing import TYPE_CHECKING

from vmsilod.waiting import readable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

REQUEST = b'{"execute": "qmp_capabilities"}\n{"execute": "query-status"}\n'
ANSWERS = 2
MAX_BYTES = 64 * 1024
SECONDS = 60.0  # in all; a QEMU that takes longer to begin is a stuck one


async def await_main_loop(monitor: Path) -> bool:
    """True when QEMU runs its guest, False when it ended before, or says nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(0)
        received = b""
        try:
            # A listening stream socket takes a connection and a few bytes before anybody accepts.
            sock.connect(str(monitor))
            sock.sendall(REQUEST)
            deadline = time.monotonic() + SECONDS
            found = 0
            while found < ANSWERS:
                left = deadline - time.monotonic()
                if len(received) > MAX_BYTES or left <= 0 or not await readable(sock.fileno(), left):
                    return False
                data = sock.recv(4096)
                if not data:
                    return False
                *lines, received = (received + data).split(b"\n")
                found += count_answers(lines)
        except OSError:
            return False  # it has ended, which its unit tells
    return True


def count_answers(untrusted_lines: Sequence[bytes]) -> int:
    found = 0
    for line in untrusted_lines:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            continue
        found += isinstance(message, dict) and "return" in message
    return found
