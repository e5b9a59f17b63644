"""Descriptors of others whose close would take as long as they like."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("gi", reason="needs python3-gi")

from gi.repository import Gio, GLib
from vmsilod import closing, control
from vmsilod.bus.export import Call
from vmsilod.errors import Busy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LINGER_SECONDS = 60
SOON = 5.0
PEER = control.Peer(1, 61234, 61234, "banking", "vmsilo-banking-forward.service")


@contextmanager
def lingering_socket() -> Iterator[int]:
    """A TCP socket whose close waits a minute for a reader; not once the block has ended. The taker's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        with theirs:
            ours.settimeout(0)
            while select.select([], [ours], [], 0.2)[1]:
                ours.send(bytes(1 << 16))
            ours.settimeout(None)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_SECONDS))
            yield ours.detach()


@contextmanager
def packed_socket() -> Iterator[int]:
    """A UNIX socket with such a one in its queue, where nobody sees its option."""
    with lingering_socket() as fd:
        sender, receiver = socket.socketpair()
        with sender:
            socket.send_fds(sender, [b"x"], [fd])
            os.close(fd)
        yield receiver.detach()


def closes(closers: closing.Closers, owner: closing.Owner, seconds: float = SOON) -> bool:
    """Whether a pipe of the owner's gets its turn."""
    read, write = os.pipe()
    with open(read, "rb"):  # noqa: PTH123 - a descriptor, not a path
        closers.receive(owner, 1)
        closers.close(owner, [write])
        return bool(select.select([read], [], [], seconds)[0])


def test_a_lingering_socket_holds_up_nobody() -> None:
    closers = closing.Closers()
    with lingering_socket() as fd:
        closers.receive(1, 1)
        closers.close(1, [fd])
        assert closes(closers, 1)


def test_what_cannot_be_hurried_holds_up_its_owner_alone() -> None:
    closers = closing.Closers(limit=3)
    with packed_socket() as fd:
        assert closers.receive(1, 1)
        closers.close(1, [fd])
        assert not closes(closers, 1, 0.3)
        assert closes(closers, 2)
        assert closers.receive(1, 1)
        assert not closers.receive(1, 1)
        assert closers.receive(3, 3)
    assert closes(closers, 1)


def test_beyond_the_threads_an_owner_waits_for_one_of_them() -> None:
    closers = closing.Closers(threads=1)
    with packed_socket() as fd:
        closers.receive(1, 1)
        closers.close(1, [fd])
        read, write = os.pipe()
        closers.receive(2, 1)
        closers.close(2, [write])
        assert not select.select([read], [], [], 0.3)[0]
    assert select.select([read], [], [], SOON)[0]
    os.close(read)


def test_of_an_accepted_connection_every_packet_is_closed() -> None:
    closers = closing.Closers()
    with ExitStack() as stack:
        sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for _ in range(2):
            fd = stack.enter_context(lingering_socket())
            sender.send(b"")
            socket.send_fds(sender, [b""], [fd])
            os.close(fd)
        sender.close()
        closers.receive(1, 1)
        closers.close(1, [receiver])
        assert closes(closers, 1)


class Invocation:
    """Of a message that nobody answers."""

    def __init__(self, fds: list[int]) -> None:
        self._message = Gio.DBusMessage.new_method_call("a.b", "/", "a.b", "StartDebug")
        self._message.set_unix_fd_list(Gio.UnixFDList.new_from_array(fds))

    def get_message(self) -> Gio.DBusMessage:
        return self._message

    def get_sender(self) -> str:
        return ":1.1"


def test_a_user_with_too_many_descriptors_is_refused_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closers = closing.Closers(limit=4)
    monkeypatch.setattr(closing, "receive", closers.receive)
    monkeypatch.setattr(closing, "close_received", closers.close)
    invocations: list[Any] = [Invocation([os.dup(0), os.dup(0)]) for _ in range(5)]
    calls = [Call(invocation) for invocation in invocations]
    calls[0].admit(1)
    calls[1].admit(1)
    with pytest.raises(Busy):
        calls[2].admit(1)
    calls[3].admit(2)
    for call in calls[:3]:
        call.close()
    assert closes(closers, 1)
    calls[4].admit(1)
    for call in calls[3:]:
        call.close()
    assert closes(closers, 1)
    assert closes(closers, 2)


@pytest.mark.parametrize("peer", [None, PEER])
@pytest.mark.parametrize("received", [True, False])
def test_the_loop_does_not_wait_for_what_peers_of_the_control_socket_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer: control.Peer | None, *, received: bool
) -> None:
    monkeypatch.setattr(control, "identify", lambda _sock: peer)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "control.sock"))
    listener.listen(8)
    handler: Any = None
    server = control.ControlServer(listener, handler)
    with lingering_socket() as fd, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(listener.getsockname())
        if not received:
            sock.send(b"{}")
        # Five, because the kernel closes what is too many for a buffer.
        socket.send_fds(sock, [b'{"op": "forward", "name": "banking", "listening": false}'], [fd] * 5)
        os.close(fd)
        main_loop = GLib.MainLoop()
        GLib.timeout_add(500, main_loop.quit)
        started = time.monotonic()
        main_loop.run()
        assert time.monotonic() - started < SOON
        sock.settimeout(SOON)
        assert sock.recv(4096).startswith(b'{"error"' if peer else b"")
    server.close()
