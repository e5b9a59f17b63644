"""The IPv6 addresses that the kernel answers neighbour solicitations for, as it lists them.

Called by routes.py, in the thread that is in the network's namespace. pyroute2 cannot ask for this list: it
drops the flag that the request is told by. One socket for one question.
"""

from __future__ import annotations

import os
import socket
import struct
from ipaddress import IPv6Address
from typing import TYPE_CHECKING

from vmsilod.errors import Failed

if TYPE_CHECKING:
    from collections.abc import Iterator

# linux/netlink.h, linux/rtnetlink.h, linux/neighbour.h
_GET_NEIGHBOURS, _ERROR, _DONE = 30, 2, 3
_REQUEST, _DUMP = 0x1, 0x300
_PROXY = 0x08
_DESTINATION = 1
_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_NEIGHBOUR = struct.Struct("=B3xiHBB")  # ndmsg
_ATTRIBUTE = struct.Struct("=HH")  # rtattr
_ANSWER_MAX = 1 << 16  # bytes; the kernel's own limit for one piece of a dump is half of it


def find_proxies() -> set[tuple[int, IPv6Address]]:
    """(number of the device, address). Raises Failed."""
    found: set[tuple[int, IPv6Address]] = set()
    question = _NEIGHBOUR.pack(socket.AF_INET6, 0, 0, _PROXY, 0)
    header = _HEADER.pack(_HEADER.size + len(question), _GET_NEIGHBOURS, _REQUEST | _DUMP, 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as netlink:
            netlink.sendto(header + question, (0, 0))
            while True:
                for kind, body in _split(netlink.recv(_ANSWER_MAX)):
                    if kind == _DONE:
                        return found
                    if kind == _ERROR:
                        code = -struct.unpack_from("=i", body)[0]
                        raise Failed(f"cannot read the answered addresses: {os.strerror(code)}")
                    found |= _parse(body)
    except OSError as error:
        raise Failed(f"cannot read the answered addresses: {error.strerror}") from error


def _split(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, _, _, _ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[_align(length) :]


def _parse(body: bytes) -> set[tuple[int, IPv6Address]]:
    _, index, _, flags, _ = _NEIGHBOUR.unpack_from(body)
    rest = body[_NEIGHBOUR.size :]
    while flags & _PROXY and len(rest) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(rest)
        if kind == _DESTINATION:
            return {(index, IPv6Address(rest[_ATTRIBUTE.size : length]))}
        rest = rest[_align(length) :]
    return set()


def _align(length: int) -> int:
    return (length + 3) & ~3
