"""The connection to a daemon that was taken over: what it sends costs vmsilod no descriptor and no order."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from gi.repository import GLib
from vmsilod import loop
from vmsilod.errors import VmsiloError
from vmsilod.order_socket import OrderSocket

if TYPE_CHECKING:
    from collections.abc import Callable

ANSWERS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "no json": lambda _request: b"\xff{",
    "no object": lambda _request: b"[1]",
    "broken error": lambda request: json.dumps({"id": request["id"], "error": "text"}).encode(),
}


def serve(listener: socket.socket, answer: Callable[[dict[str, Any]], bytes]) -> None:
    """Answers the first order of the first connection, with descriptors that nobody asked for."""
    connection, _ = listener.accept()
    with connection:
        while packet := connection.recv(4096):
            request = json.loads(packet)
            if request["op"] == "list":
                socket.send_fds(connection, [answer(request)], [0, 0, 0])
                return


def count_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("case", ANSWERS)
def test_nonsense_fails_the_order_and_leaks_nothing(case: str, tmp_path: Path) -> None:
    main = GLib.MainLoop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "orders"))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener, ANSWERS[case]), daemon=True)
        thread.start()
        orders = OrderSocket("test", str(tmp_path / "orders"), lambda _event: None, lambda: None)
        orders.open()
        before = count_descriptors()
        done = loop.spawn(orders.order({"op": "list"}))
        done.add_done_callback(lambda _: loop.call_soon(main.quit))
        loop.call_later(10, main.quit)
        main.run()
        orders.close()
        thread.join(10)
        with pytest.raises(VmsiloError):
            done.result(0)
        assert count_descriptors() <= before
    os.fstat(0)
