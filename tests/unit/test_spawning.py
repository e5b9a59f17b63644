"""The command that vmsilod writes itself, on each kind of socket that leads to a guest."""

from __future__ import annotations

import contextlib
import socket

import pytest
from vmsilod.errors import Failed
from vmsilod.spawning import send_frame


def test_over_a_unix_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_frame(ours.fileno(), b"frame")
        assert theirs.recv(16) == b"frame"


def test_over_vsock() -> None:
    """Not connected to anything: what counts is that its failure is the socket's."""
    with contextlib.ExitStack() as stack:
        try:
            sock = stack.enter_context(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
        except OSError as error:
            pytest.skip(f"no vsock here: {error.strerror}")
        with pytest.raises(Failed, match="does not take the command"):
            send_frame(sock.fileno(), b"frame")
