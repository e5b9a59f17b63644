"""Packets of relayd, consoled and their Unix clients: reading and refusing untrusted JSON, answering,
parting.

Pure functions and functions on one socket, used by the command and the control side. Nothing here blocks
and nothing here knows a VM.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

UCRED = struct.Struct("iII")  # pid, uid, gid: unix(7) SO_PEERCRED
DRAIN_PACKETS = 1024  # more than the default send buffer of a peer can hold
OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Refusal(Exception):
    """A request that is answered with an error: machine code, fact, and what to do about it."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    def to_json(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message, "hint": self.hint}


def read_peer_uid(sock: socket.socket) -> int:
    return read_peer(sock)[1]


def read_peer(sock: socket.socket) -> tuple[int, int]:
    """The pid and the uid of the peer when it connected."""
    pid, uid, _gid = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return int(pid), int(uid)


def encode_packet(obj: object) -> bytes:
    return json.dumps(obj, separators=(",", ":")).encode()


def parse_object(untrusted_packet: bytes) -> dict[str, object]:
    """The JSON object in a packet; raises Refusal("bad-request")."""
    try:
        untrusted_value = json.loads(untrusted_packet, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise Refusal("bad-request", "the request is not JSON") from exc
    if not isinstance(untrusted_value, dict):
        raise Refusal("bad-request", "the request is not a JSON object")
    return untrusted_value


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def check_keys(
    request: dict[str, object], required: Collection[str], optional: Collection[str] = ()
) -> None:
    missing = [key for key in required if key not in request]
    unknown = [key for key in request if key not in required and key not in optional]
    if missing:
        raise Refusal("bad-request", f"missing: {', '.join(missing)}")
    if unknown:
        raise Refusal("bad-request", f"unknown keys: {', '.join(ascii(key[:40]) for key in unknown[:5])}")


def take_str(request: dict[str, object], key: str, limit: int) -> str:
    value = request.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= limit:
        raise Refusal("bad-request", f"{key} must be a string of 1 to {limit} characters")
    return value


def take_int(request: dict[str, object], key: str, low: int, high: int) -> int:
    value = request.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Refusal("bad-request", f"{key} must be an integer from {low} to {high}")
    return value


def receive_packet(sock: socket.socket, size: int, fds_max: int) -> tuple[bytes, list[int], bool]:
    """One packet, its descriptors (the caller's from now on) and whether it was cut short.

    Raises OSError; BlockingIOError where none waits. b"" is the end.
    """
    space = socket.CMSG_SPACE(fds_max * 4)
    packet, ancillary, flags, _ = sock.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.extend(struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4]))
    return packet, fds, bool(flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC))


def send_packet(sock: socket.socket, packet: bytes, fd: int | None = None) -> bool:
    """Send one packet, with a descriptor if given; False if the peer's queue is full. Raises OSError."""
    rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
    try:
        sock.sendmsg([packet], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except BlockingIOError:
        return False
    return True


def part(sock: socket.socket) -> None:
    """Close so that the peer reads our last packet.

    A Unix socket closed with unread packets gives the peer ECONNRESET before what is queued for it, so
    further packets are shut out and those in the queue are taken first.
    """
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
        for _ in range(DRAIN_PACKETS):
            if not sock.recv(1, socket.MSG_DONTWAIT):
                break
    sock.close()


def dismiss(sock: socket.socket, refusal: Refusal) -> None:
    """Tell the peer why, if it can take it, and close."""
    with contextlib.suppress(OSError):  # a peer that is gone or reads nothing is dismissed all the same
        send_packet(sock, encode_packet({"error": refusal.to_json()}))
    part(sock)


def accept(listener: socket.socket) -> tuple[socket.socket, object] | None:
    """One waiting connection, or None. Raises OSError only when descriptors or memory ran out."""
    try:
        sock, address = listener.accept()
    except OSError as exc:
        if exc.errno in OUT_OF_RESOURCES:
            raise
        return None  # nothing waits, or the peer gave up while it waited
    sock.settimeout(0)
    return sock, address


def close_fds(fds: Collection[int]) -> None:
    for fd in fds:
        os.close(fd)
