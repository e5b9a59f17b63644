"""The bytes of one forward, copied between a TCP connection and a connection that carries them in frames.

Used by the agent and by the host's forwarder, which have different loops: so it registers nothing, says by
`watch` what it waits for, and is told by `on_plain` and `on_framed`. It owns both sockets from its
construction and closes them before it calls `ended`, once. Each side is read only while there is room for it
at the other, and at most one portion per event, so that many bridges of one loop take turns.

The end of one direction travels as an empty frame, because a hybrid vsock cannot close half a connection.
When both have ended the agent says DONE, and only then the host closes: what is still on its way is never
cut off. A connection that breaks any other way breaks the other one: with a reset, so that it cannot pass
for an end.
"""

import contextlib
import socket
import struct

from vmsilo_wire.frames import (
    DONE,
    FORWARD_IN,
    FORWARD_OUT,
    FORWARD_TO_AGENT,
    FORWARD_TO_CLIENT,
    HEADER_SIZE,
    Pieces,
    ProtocolError,
    encode_frame,
    pack_header,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Watch = Callable[[socket.socket, bool, bool], None]

PORTION = 128 * 1024  # what an empty socket buffer takes whole, so that nothing is kept here
_RESET = struct.pack("ii", 1, 0)  # struct linger: on, no time


class Broken(Exception):
    """One of the two connections is not usable any more."""


class Bridge:
    """`in_guest`: this is the agent's end. `watch(sock, read, write)` with both False ends a watch."""

    _outward = bytearray(HEADER_SIZE + PORTION)
    _inward = memoryview(bytearray(HEADER_SIZE + PORTION))

    def __init__(
        self,
        plain: socket.socket,
        framed: socket.socket,
        watch: "Watch",
        ended: "Callable[[str], None]",
        *,
        in_guest: bool,
    ) -> None:
        self.plain = plain
        self.framed = framed
        self._watch = watch
        self._ended: Callable[[str], None] | None = ended
        self._in_guest = in_guest
        self._kind = FORWARD_OUT if in_guest else FORWARD_IN
        self._pieces = Pieces(FORWARD_TO_AGENT if in_guest else FORWARD_TO_CLIENT)
        self._to_framed = b""  # what did not fit, and then nothing more is read
        self._to_plain = b""
        self._sent_end = False
        self._got_end = False
        self._shut = False  # the peer's end was passed on
        self._done = False
        self._wanted: dict[socket.socket, tuple[bool, bool]] = {}
        for sock in (plain, framed):
            sock.settimeout(0)

    def start(self) -> None:
        if self.plain.family != socket.AF_UNIX:
            self.plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A peer that vanished without a word would keep its place for ever.
            self.plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._rewatch()

    def close(self, reason: str) -> None:
        """Ends both connections now; who is at the TCP end sees a reset unless all was said."""
        ended, self._ended = self._ended, None
        if ended is None:
            return
        for sock in (self.plain, self.framed):
            if self._wanted.pop(sock, (False, False)) != (False, False):
                self._watch(sock, False, False)  # noqa: FBT003 the callback's signature
        if reason:
            reset(self.plain)
        else:
            self.plain.close()
        self.framed.close()
        ended(reason)

    @property
    def finished(self) -> bool:
        """Of the agent's end: DONE is said, and the host is to close."""
        return self._in_guest and self._done and not self._to_framed

    def on_plain(self, *, readable: bool, writable: bool) -> None:
        self._turn(outward=readable, inward=writable and bool(self._to_plain))

    def on_framed(self, *, readable: bool, writable: bool) -> None:
        self._turn(outward=writable and bool(self._to_framed), inward=readable)

    def _turn(self, *, outward: bool, inward: bool) -> None:
        if self._ended is None:
            return
        try:
            if outward:
                self._copy_out()
            if inward:
                self._copy_in()
            self._check_end()
        except (Broken, ProtocolError) as exc:
            self.close(str(exc))
        except OSError as exc:
            self.close(exc.strerror or repr(exc))
        else:
            self._rewatch()

    def _copy_out(self) -> None:
        """One portion from the TCP connection into a frame."""
        if self._to_framed:
            self._send_framed(self._to_framed)
            return
        if self._sent_end:
            return
        buffer = self._outward
        with memoryview(buffer) as view:
            try:
                count = self.plain.recv_into(view[HEADER_SIZE:])
            except BlockingIOError:
                return
            pack_header(buffer, self._kind, count)
            self._sent_end = not count
            self._send_framed(view[: HEADER_SIZE + count])

    def _send_framed(self, data: "bytes | memoryview") -> None:
        self._to_framed = send_some(self.framed, data)

    def _copy_in(self) -> None:
        """One portion out of frames to the TCP connection."""
        if self._to_plain:
            self._to_plain = send_some(self.plain, self._to_plain)
            return
        try:
            count = self.framed.recv_into(self._inward)
        except BlockingIOError:
            return
        if not count:
            if self.finished:  # DONE was heard: the host closes first
                self.close("")
                return
            raise Broken("the connection between host and guest broke")
        for kind, piece in self._pieces.feed(self._inward[:count]):
            if kind == DONE:
                self._done = True
            elif not len(piece):
                self._got_end = True
            elif self._to_plain:
                self._to_plain += piece
            else:
                self._to_plain = send_some(self.plain, piece)

    def _check_end(self) -> None:
        if self._got_end and not self._to_plain and not self._shut:
            self._shut = True
            self.plain.shutdown(socket.SHUT_WR)
        if self._in_guest:
            if self._shut and self._sent_end and not self._to_framed and not self._done:
                self._done = True
                self._send_framed(encode_frame(DONE))
        elif self._done:
            if not (self._got_end and self._sent_end) or self._to_framed:
                raise Broken("the guest spoke of an end that was none")
            if self._shut:
                self.close("")

    def _rewatch(self) -> None:
        if self._ended is None:
            return
        self._want(self.plain, read=not self._sent_end and not self._to_framed, write=bool(self._to_plain))
        self._want(self.framed, read=not self._to_plain, write=bool(self._to_framed))

    def _want(self, sock: socket.socket, *, read: bool, write: bool) -> None:
        if self._wanted.get(sock, (False, False)) != (read, write):
            self._wanted[sock] = (read, write)
            self._watch(sock, read, write)


def send_some(sock: socket.socket, data: "bytes | memoryview") -> bytes:
    """What did not fit. Raises OSError."""
    try:
        sent = sock.send(data, socket.MSG_NOSIGNAL)
    except BlockingIOError:
        sent = 0
    return bytes(data[sent:])


def reset(plain: socket.socket) -> None:
    """Close so that who connected does not take it for an end."""
    with contextlib.suppress(OSError):  # gone already, which is what this is for
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    plain.close()
