"""TAPs whose other end is the test, and machines in namespaces of their own behind veth pairs."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
CLONE_NEWNET = 0x40000000
FRAME_MAX = 65536
WAIT = 2.0
"""Seconds for what must arrive."""
SHORT = 0.2
"""Seconds after which what was dropped would have been there."""

_libc = ctypes.CDLL(None, use_errno=True)


def run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done.stdout


def ip(line: str) -> None:
    run("ip", *line.split())


def set_sysctl(key: str, value: str) -> None:
    Path("/proc/sys", key).write_text(value)


class Tap:
    """The guest's end of a TAP: frames in and out by its descriptor."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(self.fd, TUNSETIFF, struct.pack("16sH14x", name.encode(), IFF_TAP | IFF_NO_PI))
        set_sysctl(f"net/ipv6/conf/{name}/accept_dad", "0")

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            os.write(self.fd, frame)

    def receive(self, wanted: bytes = b"", seconds: float = WAIT) -> bytes | None:
        """The next frame in which `wanted` is; None when none came in time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not select.select([self.fd], [], [], left)[0]:
                break
            frame = os.read(self.fd, FRAME_MAX)
            if wanted in frame:
                return frame
        return None

    def host_mac(self) -> str:
        return mac_of(self.name)

    def close(self) -> None:
        os.close(self.fd)


@dataclass(frozen=True)
class Peer:
    """Another machine: a network namespace, the other end of a veth pair in it, always `eth0`."""

    fd: int
    link: str

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread is in the peer's namespace; sockets opened here stay there."""
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        assert _libc.setns(self.fd, CLONE_NEWNET) == 0
        try:
            yield
        finally:
            assert _libc.setns(own, CLONE_NEWNET) == 0
            os.close(own)

    def ip(self, line: str) -> None:
        with self.entered():
            ip(line)

    def udp_socket(self, port: int, address: str = "0.0.0.0") -> socket.socket:
        return self._bound(socket.SOCK_DGRAM, port, address)

    def listener(self, port: int, address: str = "0.0.0.0") -> socket.socket:
        found = self._bound(socket.SOCK_STREAM, port, address)
        found.listen()
        return found

    def _bound(self, kind: socket.SocketKind, port: int, address: str) -> socket.socket:
        with self.entered():
            found = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        found.settimeout(WAIT)
        found.bind((address, port))
        return found

    def raw_socket(self) -> socket.socket:
        with self.entered():
            found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            found.bind(("eth0", 0))
        found.settimeout(WAIT)
        return found

    def mac(self) -> str:
        with self.entered():
            shown = run("ip", "-o", "link", "show", "eth0")
        return shown.split("link/ether ")[1].split()[0]


def new_namespace() -> int:
    """A descriptor of it: it ends with the last one."""
    made: list[int] = []

    def enter() -> None:
        assert _libc.unshare(CLONE_NEWNET) == 0
        made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        ip("link set lo up")

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    return made[0]


@contextmanager
def peer(link: str, *addresses: str) -> Iterator[Peer]:
    """A machine behind the host's interface `link`, with these addresses (and prefix lengths)."""
    fd = new_namespace()
    try:
        ip(f"link add {link} type veth peer name eth0 netns /proc/{os.getpid()}/fd/{fd}")
        made = Peer(fd, link)
        # A link-local address that is still checked cannot ask for neighbours.
        set_sysctl(f"net/ipv6/conf/{link}/accept_dad", "0")
        with made.entered():
            set_sysctl("net/ipv6/conf/eth0/accept_dad", "0")
        made.ip("link set eth0 up")
        ip(f"link set {link} up")
        for address in addresses:
            made.ip(f"addr add {address} dev eth0{' nodad' if ':' in address else ''}")
        yield made
    finally:
        subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)
        os.close(fd)


def mac_of(name: str) -> str:
    return Path(f"/sys/class/net/{name}/address").read_text().strip()


def received(udp: socket.socket, seconds: float = WAIT) -> tuple[bytes, str] | None:
    """A datagram with its sender's address."""
    udp.settimeout(seconds)
    try:
        data, sender = udp.recvfrom(FRAME_MAX)
    except TimeoutError:
        return None
    return data, sender[0]


def heard(line: socket.socket, wanted: bytes) -> bool:
    """Whether a frame with `wanted` comes by before it has been quiet for a moment."""
    line.settimeout(SHORT)
    try:
        while wanted not in line.recv(FRAME_MAX):
            pass
    except TimeoutError:
        return False
    return True
