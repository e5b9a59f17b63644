"""The client's side of the wire to a guest agent: frames out, frames in.

Holds no descriptor of its own.

The guest is hostile: a length is checked before a byte is kept, and data frames are passed on in the
pieces in which they arrive, so a guest decides neither how much memory is used nor how long a piece is
held back.
"""

import os
import struct

from vmsilo_wire import STDERR, STDOUT, TO_CLIENT, ProtocolError

HEADER = struct.Struct(">BI")
DATA = (STDOUT, STDERR)


class FrameReader:
    """Cuts a byte stream into (type, payload): control frames whole, data frames in pieces."""

    __slots__ = ("_held", "_kind", "_left")

    def __init__(self) -> None:
        self._kind = 0
        self._left = 0
        self._held = bytearray()

    def feed(self, untrusted_data: memoryview) -> list[tuple[int, memoryview | bytes]]:
        """Data pieces are views of the argument: use them before the next read."""
        found: list[tuple[int, memoryview | bytes]] = []
        at, end = 0, len(untrusted_data)
        while at < end:
            if self._kind == 0:
                at = self._take_header(untrusted_data, at)
                if self._kind and not self._left:
                    if self._kind not in DATA:
                        found.append((self._kind, b""))
                    self._kind = 0
                continue
            piece = untrusted_data[at : at + self._left]
            at += len(piece)
            self._left -= len(piece)
            if self._kind in DATA:
                found.append((self._kind, piece))
            else:
                self._held += piece
                if not self._left:
                    found.append((self._kind, bytes(self._held)))
                    self._held.clear()
            if not self._left:
                self._kind = 0
        return found

    def _take_header(self, data: memoryview, at: int) -> int:
        if not self._held and len(data) - at >= HEADER.size:
            kind, length = HEADER.unpack_from(data, at)
            at += HEADER.size
        else:
            piece = data[at : at + HEADER.size - len(self._held)]
            self._held += piece
            at += len(piece)
            if len(self._held) < HEADER.size:
                return at
            kind, length = HEADER.unpack(self._held)
            self._held.clear()
        least, most = TO_CLIENT.get(kind, (1, 0))
        if not least <= length <= most:
            raise ProtocolError(f"frame type {kind} with {length} bytes")
        self._kind, self._left = kind, length
        return at


class FrameWriter:
    """Frames to a non-blocking descriptor; what it does not take at once is kept, in order."""

    __slots__ = ("_fd", "closed", "pending")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.pending = b""
        self.closed = False

    def send(self, kind: int, payload: memoryview | bytes) -> None:
        header = HEADER.pack(kind, len(payload))
        if self.closed:
            return
        if self.pending:
            self.pending += header + bytes(payload)
            return
        sent = self._write([header, payload])
        if sent < len(header) + len(payload):
            self.pending = (header + bytes(payload))[sent:]

    def send_encoded(self, data: bytes) -> None:
        """Whole frames, before any other."""
        self.pending += data
        self.flush()

    def flush(self) -> None:
        if self.pending:
            self.pending = self.pending[self._write([self.pending]) :]

    def _write(self, pieces: list[memoryview | bytes]) -> int:
        try:
            return os.writev(self._fd, pieces)
        except BlockingIOError:
            return 0
        except OSError:
            # The agent closed; what it said before is still to be read, so reading decides how this ends.
            self.closed = True
            self.pending = b""
            return sum(len(p) for p in pieces)
