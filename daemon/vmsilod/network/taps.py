"""TAP devices by ioctl on /dev/net/tun: made so that no TAP of somebody else can be taken over, opened so
that nothing is passed on but what was meant.

Called by the batch and by the switch, in a worker, in whatever network namespace that thread is in. pyroute2
is not used for it: it takes over an existing TAP without a word. A descriptor is its caller's. Whoever holds
one, so a VMM, may change the TAP by it: see `Link.tun` for what is looked at after a run.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING

from vmsilod.errors import Failed, StartFailed

if TYPE_CHECKING:
    from vmsilod.network.plan import Port

NODE = "/dev/net/tun"

# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETPERSIST = 0x400454CB
TUNSETOWNER = 0x400454CC
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
TUNSETSNDBUF = 0x400454D4
TUNDETACHFILTER = 0x401054D6
TUNSETVNETHDRSZ = 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x2, 0x1000, 0x4000, 0x100
IFF_PERSIST, IFF_TUN_EXCL = 0x800, 0x8000
_REQUEST = struct.Struct("16sH22x")  # ifreq: name, flags
_KIND = IFF_TAP | IFF_NO_PI
_NO_LIMIT = 0x7FFFFFFF
_PLAIN_HEADER = 10  # bytes; struct virtio_net_hdr
NAME_MAX = 15


def create_tap(name: str, *, queues: int, offload: bool) -> int:
    """A new TAP that ends with the returned descriptor, until `make_persistent`. Down, root's.

    `offload` as in Port. Raises Failed, also where a device of that name exists.
    """
    fd = _open_node()
    try:
        _attach(fd, name, tap_flags(queues, offload=offload) | IFF_TUN_EXCL)
        # Without an owner any user could open a queue of it once it is persistent: the node is open to all.
        fcntl.ioctl(fd, TUNSETOWNER, 0)
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EBUSY:
            raise Failed(f"there is already a network device '{name}'") from error
        raise Failed(f"cannot make the TAP '{name}': {error.strerror}") from error
    except Failed:
        os.close(fd)
        raise
    return fd


def make_persistent(fd: int) -> None:
    fcntl.ioctl(fd, TUNSETPERSIST, 1)


def open_queues(port: Port, index: int) -> list[int]:
    """Descriptors of the port's persistent TAP, which is device number `index`, as if it were new. Raises
    StartFailed, and then holds nothing.
    """
    flags = tap_flags(port.queues, offload=port.offload)
    fds: list[int] = []
    try:
        for _ in range(port.queues):
            fd = _open_node()
            fds.append(fd)
            _attach(fd, port.tap, flags)
            _require_shape(fd, port.tap, index, flags)
            _forget_last_user(fd)
    except (OSError, Failed) as error:
        for fd in fds:
            os.close(fd)
        fact = error.strerror if isinstance(error, OSError) else error.message
        if isinstance(error, OSError) and error.errno == errno.EBUSY:
            fact = "another process has it open"
        raise StartFailed(f"cannot open the TAP '{port.tap}': {fact}") from error
    return fds


def _open_node() -> int:
    try:
        return os.open(NODE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Failed(f"cannot open {NODE}: {error.strerror}") from error


def tap_flags(queues: int, *, offload: bool) -> int:
    """Of a TAP's descriptors, and of a macvtap's."""
    return _KIND | (IFF_VNET_HDR if offload else 0) | (IFF_MULTI_QUEUE if queues > 1 else 0)


def _attach(fd: int, name: str, flags: int) -> None:
    data = name.encode()
    if len(data) > NAME_MAX:  # the kernel would cut it
        raise Failed(f"'{name}' is longer than {NAME_MAX} bytes")
    fcntl.ioctl(fd, TUNSETIFF, _REQUEST.pack(data, flags))


def _require_shape(fd: int, name: str, index: int, wanted: int) -> None:
    """The name may have changed hands since it was looked up; one that is gone would just have been made."""
    answer = bytearray(_REQUEST.size)
    fcntl.ioctl(fd, TUNGETIFF, answer)
    flags = _REQUEST.unpack(answer)[1]
    told = IFF_PERSIST | _KIND | IFF_VNET_HDR | IFF_MULTI_QUEUE
    if flags & told != wanted | IFF_PERSIST or socket.if_nametoindex(name) != index:
        raise Failed("it is not the one that was made for this VM")


def _forget_last_user(fd: int) -> None:
    """What a VMM had set stays with the TAP: offloads, header size, a filter, a send buffer."""
    fcntl.ioctl(fd, TUNSETOFFLOAD, 0)
    fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", _PLAIN_HEADER))
    fcntl.ioctl(fd, TUNDETACHFILTER, bytes(16))
    fcntl.ioctl(fd, TUNSETSNDBUF, struct.pack("i", _NO_LIMIT))
