"""Frames: type and length, then that many bytes.

Owns the numbers of the protocol and the only code that looks at an untrusted length.  See the package
docstring for who calls it; a `Decoder` lives as long as its connection.
"""

import struct

VERSION = 1
AGENT_PORT = 700  # below 1024, so that no unprivileged guest process can listen on it
HOST_PORT = 701
HOST_CID = 2  # VMADDR_CID_HOST

DATA_MAX = 256 * 1024
CONTROL_MAX = 1024 * 1024  # SPAWN only: argv and environment
JSON_MAX = 64 * 1024
PING_MAX = 64
STDIN_WINDOW = 1024 * 1024
CONSOLE_SIDE_MAX = 1000  # rows or columns

HELLO = 1
SPAWN = 2
STDIN = 3
RESIZE = 4
SIGNAL = 5
POWEROFF = 6
PING = 7
CONSOLE_SIZE = 8
CONNECT = 9
ACCEPT = 10
FORWARD_IN = 11
STARTED = 16
STDOUT = 17
STDERR = 18
EXIT = 19
ERROR = 20
CONSUMED = 21
PONG = 22
CONNECTED = 23
FORWARD_OUT = 24
DONE = 25

# type -> (least, most) payload bytes
TO_AGENT = {
    HELLO: (2, JSON_MAX),
    SPAWN: (2, CONTROL_MAX),
    STDIN: (0, DATA_MAX),
    RESIZE: (4, 4),
    SIGNAL: (1, 1),
    POWEROFF: (0, 0),
    PING: (0, PING_MAX),
    CONSOLE_SIZE: (4, 4),
    CONNECT: (2, 2),
    ACCEPT: (2, 2),
}
TO_CLIENT = {
    STARTED: (2, JSON_MAX),
    STDOUT: (0, DATA_MAX),
    STDERR: (0, DATA_MAX),
    EXIT: (2, JSON_MAX),
    ERROR: (2, JSON_MAX),
    CONSUMED: (4, 4),
    PONG: (0, PING_MAX),
    CONNECTED: (0, 0),
}
# What follows CONNECTED, and nothing else does.
FORWARD_TO_AGENT = {FORWARD_IN: (0, DATA_MAX)}
FORWARD_TO_CLIENT = {FORWARD_OUT: (0, DATA_MAX), DONE: (0, 0)}

ROLES = ("user", "root", "control", "forward")
ERROR_CODES = ("denied", "not-found", "not-executable", "bad-request", "busy", "failed")
SIGNALS = frozenset((1, 2, 3, 10, 12, 15, 18, 20))  # HUP INT QUIT USR1 USR2 TERM CONT TSTP

_HEADER = struct.Struct(">BI")
_RESIZE = struct.Struct(">HH")
_CONSUMED = struct.Struct(">I")
_PORT = struct.Struct(">H")
HEADER_SIZE = _HEADER.size

_ALL = {**TO_AGENT, **TO_CLIENT, **FORWARD_TO_AGENT, **FORWARD_TO_CLIENT}


class ProtocolError(Exception):
    """The peer broke the protocol; the connection cannot be used any more."""


def encode_frame(kind: int, payload: bytes = b"") -> bytes:
    """One frame; ValueError where the receiver would refuse it."""
    least, most = _ALL[kind]
    if not least <= len(payload) <= most:
        raise ValueError(f"frame type {kind} cannot carry {len(payload)} bytes ({least} to {most})")
    return _HEADER.pack(kind, len(payload)) + payload


def pack_header(buffer: bytearray, kind: int, length: int) -> None:
    """Writes a header at the start of `buffer`, for a sender that read its payload to offset HEADER_SIZE."""
    _HEADER.pack_into(buffer, 0, kind, length)


def encode_resize(rows: int, cols: int) -> bytes:
    """Both clamped to what the kernel's `struct winsize` holds."""
    return encode_frame(RESIZE, _RESIZE.pack(max(0, min(rows, 0xFFFF)), max(0, min(cols, 0xFFFF))))


def encode_console_size(rows: int, cols: int) -> bytes:
    """Both clamped to what the agent takes."""
    clamped = (max(1, min(side, CONSOLE_SIDE_MAX)) for side in (rows, cols))
    return encode_frame(CONSOLE_SIZE, _RESIZE.pack(*clamped))


def encode_signal(number: int) -> bytes:
    if number not in SIGNALS:
        raise ValueError(f"signal {number} cannot be forwarded")
    return encode_frame(SIGNAL, bytes((number,)))


def encode_consumed(count: int) -> bytes:
    return encode_frame(CONSUMED, _CONSUMED.pack(count))


def encode_forward(kind: int, port: int) -> bytes:
    """CONNECT or ACCEPT, for a TCP port of the guest."""
    return encode_frame(kind, _PORT.pack(port))


def parse_resize(untrusted_payload: bytes) -> tuple[int, int]:
    """(rows, cols)"""
    try:
        rows, cols = _RESIZE.unpack(untrusted_payload)
    except struct.error as exc:
        raise ProtocolError("bad RESIZE") from exc
    return rows, cols


def parse_console_size(untrusted_payload: bytes) -> tuple[int, int]:
    """(rows, cols), both from 1 to CONSOLE_SIDE_MAX"""
    rows, cols = parse_resize(untrusted_payload)
    if not (1 <= rows <= CONSOLE_SIDE_MAX and 1 <= cols <= CONSOLE_SIDE_MAX):
        raise ProtocolError("no size for a console")
    return rows, cols


def parse_signal(untrusted_payload: bytes) -> int:
    if len(untrusted_payload) != 1 or untrusted_payload[0] not in SIGNALS:
        raise ProtocolError("signal not allowed")
    return untrusted_payload[0]


def parse_consumed(untrusted_payload: bytes) -> int:
    try:
        count: int = _CONSUMED.unpack(untrusted_payload)[0]
    except struct.error as exc:
        raise ProtocolError("bad CONSUMED") from exc
    return count


def parse_port(untrusted_payload: bytes) -> int:
    try:
        port: int = _PORT.unpack(untrusted_payload)[0]
    except struct.error as exc:
        raise ProtocolError("bad port") from exc
    if not port:
        raise ProtocolError("port 0 cannot be forwarded")
    return port


class Pieces:
    """The bytes of a forward out of their frames, piece by piece as they arrive; holds a header at most.

    `limits` is FORWARD_TO_AGENT or FORWARD_TO_CLIENT. Nothing but DONE may follow the end of the bytes.
    """

    __slots__ = ("_ended", "_held", "_left", "_limits")

    def __init__(self, limits: dict[int, tuple[int, int]]) -> None:
        self._limits = limits
        self._held = bytearray()
        self._left = 0  # bytes of the frame that is open
        self._ended = False

    def feed(self, untrusted_data: memoryview) -> "list[tuple[int, memoryview]]":
        """(type, piece), valid as long as `untrusted_data`; an empty piece is the frame without payload."""
        found: list[tuple[int, memoryview]] = []
        at, end = 0, len(untrusted_data)
        while at < end:
            if self._left:
                piece = untrusted_data[at : at + self._left]
                self._left -= len(piece)
                at += len(piece)
                found.append((min(self._limits), piece))
                continue
            header = untrusted_data[at : at + HEADER_SIZE - len(self._held)]
            at += len(header)
            self._held += header
            if len(self._held) == HEADER_SIZE:
                self._open(found)
        return found

    def _open(self, found: "list[tuple[int, memoryview]]") -> None:
        kind, length = _HEADER.unpack(self._held)
        self._held.clear()
        limit = self._limits.get(kind)
        if limit is None or not limit[0] <= length <= limit[1]:
            raise ProtocolError(f"frame type {kind} with {length} bytes in a forward")
        if self._ended and kind != DONE:
            raise ProtocolError("bytes after their end")
        self._left = length
        if not length:
            self._ended = True
            found.append((kind, memoryview(b"")))


class Decoder:
    """Bytes in, whole frames out; never holds more than one unfinished frame of a permitted length.

    `limits` is TO_AGENT or TO_CLIENT, the direction that is read.  With `first`, nothing but that type is
    accepted until one such frame has come, so that an unauthenticated peer cannot make the reader buffer
    more than that type's limit.
    """

    __slots__ = ("_buffer", "_first", "_limits")

    def __init__(self, limits: dict[int, tuple[int, int]], *, first: int | None = None) -> None:
        self._limits = limits
        self._first = first
        self._buffer = bytearray()

    @property
    def pending(self) -> int:
        """Bytes of an unfinished frame: not 0 at the end of the stream means it was cut."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> list[tuple[int, bytes]]:
        """(type, payload) of every frame that `data` completes; ProtocolError, for ever, on a bad header."""
        buffer = self._buffer
        if buffer:
            buffer += data
            frames, used = self._split(buffer)
            del buffer[:used]
        else:
            frames, used = self._split(data)
            buffer += memoryview(data)[used:]
        return frames

    def _split(self, data: bytes | bytearray | memoryview) -> tuple[list[tuple[int, bytes]], int]:
        frames = []
        position = 0
        with memoryview(data) as view:
            size = len(view)
            while size - position >= HEADER_SIZE:
                kind, length = _HEADER.unpack_from(view, position)
                self._check(kind, length)
                end = position + HEADER_SIZE + length
                if end > size:
                    break
                frames.append((kind, bytes(view[position + HEADER_SIZE : end])))
                self._first = None
                position = end
        return frames, position

    def _check(self, kind: int, length: int) -> None:
        limit = self._limits.get(kind)
        problem = None
        if limit is None:
            problem = f"frame type {kind} not allowed here"
        elif self._first is not None and kind != self._first:
            problem = f"frame type {kind} before type {self._first}"
        elif not limit[0] <= length <= limit[1]:
            problem = f"frame type {kind} with {length} bytes"
        if problem:
            self._limits = {}
            raise ProtocolError(problem)
