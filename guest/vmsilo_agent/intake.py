"""Frames from the host: control frames whole, standard input in the pieces in which it arrives.

Owned by a connection.  A piece is a view of what was received, so that a command's input is copied by the
kernel only.  Of anything else it holds at most one unfinished frame of a permitted length.
"""

import struct

from vmsilo_wire import HEADER_SIZE, HELLO, STDIN, TO_AGENT, ProtocolError

_HEADER = struct.Struct(">BI")


class Intake:
    """Nothing but HELLO is accepted until one has come whole, as with `vmsilo_wire.Decoder`."""

    __slots__ = ("_greeted", "_held", "_kind", "_left")

    def __init__(self) -> None:
        self._greeted = False
        self._kind = 0  # of the frame whose payload is expected; 0: a header is
        self._left = 0  # bytes of that payload
        self._held = bytearray()

    @property
    def between_frames(self) -> bool:
        return not self._kind and not self._held

    def feed(self, untrusted_data: memoryview) -> list[tuple[int, bytes | memoryview]]:
        """(type, payload); pieces of STDIN are valid until the next read, and empty only at its end."""
        found: list[tuple[int, bytes | memoryview]] = []
        at, end = 0, len(untrusted_data)
        while at < end:
            if not self._kind:
                piece = untrusted_data[at : at + HEADER_SIZE - len(self._held)]
                at += len(piece)
                self._held += piece
                if len(self._held) < HEADER_SIZE:
                    break
                self._open(*_HEADER.unpack(self._held))
                self._held.clear()
                piece = untrusted_data[at:at]
            else:
                piece = untrusted_data[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
            self._keep(piece, found)
        return found

    def _open(self, kind: int, length: int) -> None:
        limit = TO_AGENT.get(kind)
        if limit is None:
            raise ProtocolError(f"frame type {kind} not allowed here")
        if not self._greeted and kind != HELLO:
            raise ProtocolError(f"frame type {kind} before type {HELLO}")
        if not limit[0] <= length <= limit[1]:
            raise ProtocolError(f"frame type {kind} with {length} bytes")
        self._kind, self._left = kind, length

    def _keep(self, piece: memoryview, found: list[tuple[int, bytes | memoryview]]) -> None:
        if self._kind == STDIN:
            if len(piece) or not self._left:
                found.append((STDIN, piece))
        else:
            self._held += piece
            if not self._left:
                found.append((self._kind, bytes(self._held)))
                self._held.clear()
        if not self._left:
            self._greeted = True
            self._kind = 0
