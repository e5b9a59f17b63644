"""Tells the guest how large the terminal is on which its console is shown; a serial line cannot.

Asks relayd for a connection to the guest's agent as vm-run does, but never waits for it: the console shows a
boot, and a boot has no agent yet. Whatever fails here fails silently, since the console works without.
Made by `console` for the time that it is attached to a running VM, closed by it.
"""

import _socket
import os
import time

from vmsilo_wire import ERROR, ProtocolError, encode_console_size
from vmsilo_wire.payload import load_json

from vmsilo.command_socket import FDS_MAX, PACKET_MAX, take_fds
from vmsilo.frames import FrameReader, FrameWriter
from vmsilo.names import socket_path
from vmsilo.place import Place

RETRY_FIRST = 2.0
RETRY_MOST = 60.0
READ_SIZE = 4096


class ConsoleSize:
    """`fd` is -1 or to be polled for input, `deadline` is None or when `on_time` is wanted."""

    __slots__ = (
        "_agent",
        "_delay",
        "_name",
        "_place",
        "_reader",
        "_size",
        "_sock",
        "_useless",
        "_writer",
        "deadline",
    )

    def __init__(self, name: str, place: Place) -> None:
        self._name = name
        self._place = place
        self._size: tuple[int, int] | None = None
        self._sock: _socket.socket | None = None
        self._agent = -1
        self._reader = FrameReader()
        self._writer: FrameWriter | None = None
        self._delay = RETRY_FIRST
        self._useless = False  # the guest's agent cannot do it
        self.deadline: float | None = None

    @property
    def fd(self) -> int:
        return self._sock.fileno() if self._sock is not None else self._agent

    def tell(self, rows: int, cols: int) -> None:
        if self._size == (rows, cols):
            return
        self._size = (rows, cols)
        if self._writer is not None:
            self._send(self._writer)
        elif self._sock is None and not self._useless:
            self._ask()

    def on_time(self) -> None:
        self.deadline = None
        if self._size is not None and self.fd < 0:
            self._ask()

    def on_input(self) -> None:
        try:
            if self._sock is not None:
                self._take_answer(self._sock)
            elif self._agent >= 0:
                self._read_agent()
        except ProtocolError:
            self._give_up()
        except OSError:
            self._try_later()

    def close(self) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()
        agent, self._agent = self._agent, -1
        self._writer = None
        if agent >= 0:
            os.close(agent)

    def _ask(self) -> None:
        self._sock = _socket.socket(
            _socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
        )
        try:
            self._sock.connect(socket_path(self._name, self._place))
            self._sock.send(b'{"v":1,"op":"connect","wait":null}')
        except OSError:
            self._try_later()

    def _take_answer(self, sock: "_socket.socket") -> None:
        try:
            data, ancillary, _flags, _address = sock.recvmsg(
                PACKET_MAX, _socket.CMSG_SPACE(4 * FDS_MAX), _socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        fds = take_fds(ancillary)
        try:
            if not data or "error" in (reply := load_json(data)):
                self._try_later()
                return
            if reply.get("ok") is not True or not fds:
                return  # it boots
            self._agent = fds.pop(0)
        finally:
            for fd in fds:
                os.close(fd)
        sock.close()
        self._sock = None
        os.set_blocking(self._agent, False)
        self._reader = FrameReader()
        self._writer = FrameWriter(self._agent)
        self._send(self._writer)

    def _send(self, writer: FrameWriter) -> None:
        """A few bytes: what a sleeping agent does not take goes out when it has answered the last ones."""
        if self._size is not None:
            writer.send_encoded(encode_console_size(*self._size))

    def _read_agent(self) -> None:
        try:
            data = os.read(self._agent, READ_SIZE)
        except BlockingIOError:
            return
        if not data:
            self._try_later()
            return
        for kind, _untrusted_payload in self._reader.feed(memoryview(data)):
            if kind == ERROR:
                self._give_up()
                return
        self._delay = RETRY_FIRST
        if self._writer is not None:
            self._writer.flush()

    def _give_up(self) -> None:
        self._useless = True
        self.close()

    def _try_later(self) -> None:
        """A guest that reboots has a console without a size again."""
        self.close()
        self.deadline = time.monotonic() + self._delay
        self._delay = min(self._delay * 2, RETRY_MOST)
