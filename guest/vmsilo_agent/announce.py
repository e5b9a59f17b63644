"""What the agent says to the host of its own accord, and to the guest's systemd.

Host: one short message per connection, in the format of sd_notify(3), until it has been delivered.  The
relay may be restarting, or not be there yet, so a refusal is retried for ever.
"""

import errno
import os
import socket

from vmsilo_agent.loop import READ, WRITE, Loop, log
from vmsilo_agent.process import run_quietly

RETRY_FIRST = 0.1
RETRY_MOST = 5.0
_TIMEOUT = 5.0  # for one delivery
_LEAVING_TIMEOUT = 1.0
# PID 1 says READY=1 once and does not try again. The agent, which does, says it too, for the case that the
# relay was killed as it heard it: this long after its start, off the boot's path.
_BACKSTOP = 30.0
SYSTEMD_NOTIFY_VSOCK = 254  # the first systemd whose PID 1 reports to vmm.notify_socket over vsock


def notify_systemd(text: str) -> None:
    """sd_notify(3), for the unit's Type=notify; nothing where the agent was not started by systemd."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(address)
            sock.send(text.encode())
    except OSError as exc:
        log(f"cannot notify systemd, ignoring: {exc.strerror}")


def say_leaving(address: str | tuple[int, int]) -> None:
    """At SIGTERM, which a shutdown or reboot of the guest begins with: nobody is to connect from here on.

    One quick try: a host that does not hear it finds out by itself.
    """
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_VSOCK
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.settimeout(_LEAVING_TIMEOUT)
            sock.connect(address)
            sock.send(b"X_VMSILO_AGENT=0\n")
            sock.recv(64)
    except OSError as exc:
        log(f"cannot say goodbye, ignoring: {exc}")


class Announcer:
    """Delivers messages in order, one at a time."""

    def __init__(self, loop: Loop, address: str | tuple[int, int]) -> None:
        """`address`: a Unix socket's path or (CID, port)."""
        self._loop = loop
        self._address = address
        self._queue: list[bytes] = []
        self._sock: socket.socket | None = None
        self._delay = RETRY_FIRST
        self._sent = False

    def send(self, text: str) -> None:
        self._queue.append(text.encode())
        if len(self._queue) == 1:
            self._connect()

    def _connect(self) -> None:
        family = socket.AF_UNIX if isinstance(self._address, str) else socket.AF_VSOCK
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as exc:  # no vsock in this kernel
            log(f"cannot announce: {exc.strerror}")
            self._retry()
            return
        self._sock = sock
        self._sent = False
        sock.settimeout(0)
        problem = sock.connect_ex(self._address)
        if problem and problem != errno.EINPROGRESS:  # EAGAIN too: a full backlog has to be tried again
            self._failed(sock)
            return
        self._loop.watch(sock.fileno(), WRITE, lambda _mask: self._ready(sock))
        self._loop.call_later(_TIMEOUT, lambda: self._failed(sock))

    def _ready(self, sock: socket.socket) -> None:
        try:
            if self._sent:
                sock.recv(64)  # the host closes at once; anything but a reset will do
                self._delivered(sock)
                return
            problem = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if problem:
                raise OSError(problem, os.strerror(problem))
            sock.send(self._queue[0])  # far smaller than any socket buffer
            sock.shutdown(socket.SHUT_WR)
            self._sent = True
            self._loop.watch(sock.fileno(), READ, lambda _mask: self._ready(sock))
        except BlockingIOError:
            return
        except OSError:
            self._failed(sock)

    def _delivered(self, sock: socket.socket) -> None:
        self._drop(sock)
        self._delay = RETRY_FIRST
        del self._queue[0]
        if self._queue:
            self._connect()

    def _failed(self, sock: socket.socket) -> None:
        if self._sock is sock:
            self._drop(sock)
            self._retry()

    def _drop(self, sock: socket.socket) -> None:
        self._sock = None
        self._loop.forget(sock.fileno())
        sock.close()

    def _retry(self) -> None:
        self._loop.call_later(self._delay, self._connect)
        self._delay = min(self._delay * 2, RETRY_MOST)


def announce(loop: Loop, announcer: Announcer, systemctl: str, backstop: float = _BACKSTOP) -> None:
    """Says that the agent listens and who reports readiness; does that itself where systemd is too old."""

    def told_version(status: int, untrusted_output: bytes) -> None:
        words = untrusted_output.split()
        version = words[1] if not status and len(words) > 1 else b""
        if version.isdigit() and int(version) >= SYSTEMD_NOTIFY_VSOCK:
            announcer.send("X_VMSILO_AGENT=1\nX_VMSILO_READY_FROM=systemd\n")
            loop.call_later(backstop, lambda: run_or_say_ready(("is-system-running", "--wait")))
        else:
            announcer.send("X_VMSILO_AGENT=1\nX_VMSILO_READY_FROM=agent\n")
            run_or_say_ready(("is-system-running", "--wait"))

    def run_or_say_ready(words: tuple[str, ...]) -> None:
        try:
            run_quietly((systemctl, *words), loop, lambda _status, _output: announcer.send("READY=1\n"))
        except OSError:  # no systemd in this guest
            announcer.send("READY=1\n")

    try:
        run_quietly((systemctl, "--version"), loop, told_version)
    except OSError:
        told_version(1, b"")
