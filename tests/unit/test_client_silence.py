"""A command socket that nobody answers at: vm-run says so, and does not wait as for a VM that starts."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from vmsilo import command_socket
from vmsilo.errors import ClientError
from vmsilo.names import socket_path
from vmsilo.place import Place

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("booting", "wait", "seconds"), [(False, None, 1), (True, None, 3), (True, 1, 2), (True, "1", 3)]
)
def test_relay_that_never_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, booting: bool, wait: object, seconds: int
) -> None:
    monkeypatch.setattr(command_socket, "SILENCE_MOST", 1)
    monkeypatch.setattr(command_socket, "ANSWER_GRACE", 1)
    place = Place(run_dir=str(tmp_path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(socket_path("work", place))
        listener.listen()
        if booting:
            monkeypatch.setattr(
                command_socket, "_receive", lambda _sock, _name, progress: progress.say("boots", wait)
            )
        with pytest.raises(ClientError, match=f"gave no connection within {seconds} s"):
            command_socket.dial("vm-run", "work", place, wait=2)
