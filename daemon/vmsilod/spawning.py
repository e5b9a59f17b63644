"""The SPAWN frame of a command that was asked for over D-Bus, written to the guest's agent before the caller
gets the connection.

What polkit was asked about is therefore what runs. Called by the lifecycle; writes to the guest and never
reads from it.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

from vmsilo_wire.payload import Spawn, encode_spawn

from vmsilod.errors import BadRequest, Failed

if TYPE_CHECKING:
    from vmsilod.bus.requests import RunRequest

SEND_SECONDS = 10
TIMEVAL = struct.Struct("ll")


def spawn_frame(request: RunRequest) -> bytes:
    terminal = request.terminal
    try:
        return encode_spawn(
            Spawn(
                request.argv,
                cwd=request.cwd,
                env=dict(request.env),
                pty=(terminal.rows, terminal.cols) if terminal else None,
                detach=request.detach,
            )
        )
    except ValueError as error:
        raise BadRequest(str(error)) from error


def send_frame(fd: int, frame: bytes) -> None:
    """Blocks, bounded, for a guest that does not read: call it in the worker. The descriptor stays the
    caller's.
    """
    # Named AF_UNIX, whatever it is: of an AF_VSOCK socket Python sets options to integers only.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=os.dup(fd)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEVAL.pack(SEND_SECONDS, 0))
        try:
            sock.sendall(frame)
        except OSError as error:
            raise Failed(
                f"the guest's agent does not take the command: {error.strerror}", "vm-stop --force"
            ) from error
        finally:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEVAL.pack(0, 0))
