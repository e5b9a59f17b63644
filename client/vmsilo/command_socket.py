"""How vm-run gets a connection to the guest: the VM's command socket, relayd's answer, one descriptor.

Connecting starts a VM that is not running (systemd holds the socket). Until the answer comes, a person at
a terminal sees what is waited for. Keeps nothing open but the descriptor that it returns.
"""

import _socket
import os
import struct
import time

from vmsilo_wire import ProtocolError
from vmsilo_wire.payload import load_json

from vmsilo.errors import (
    ClientError,
    SocketClosedError,
    StoppedMeanwhileError,
    printable,
    write_stderr,
)
from vmsilo.names import socket_path
from vmsilo.place import Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmsilo.startup import StatusWatch

PACKET_MAX = 4096
WAIT_MOST = 3600  # seconds; the most that a start_timeout can be
ANSWER_GRACE = 15  # seconds that relayd has to say that its own wait ran out
SILENCE_MOST = 195  # seconds until its first word: it and the VM's unit may have to start, 90 s each
FDS_MAX = 4
SHOW_AFTER = 0.5  # seconds; a warm VM answers long before


class Progress:
    """One line at a terminal, replaced in place and erased; silent elsewhere."""

    __slots__ = (
        *("_name", "_place", "_program", "_shown", "_since", "_text", "_wanted", "_watch"),
        *("booting", "most"),
    )

    def __init__(self, program: str, name: str, since: float, place: Place) -> None:
        self._program = program
        self._name = name
        self._since = since
        self._text = "waiting for the VM"
        self._shown = False
        self._wanted = os.isatty(2)
        self._place = place
        self._watch: StatusWatch | None = None
        self.booting = False  # the relay has said so
        self.most = 0.0  # seconds since the beginning, in which it answers

    def say(self, untrusted_text: str, wait: "Any" = None) -> None:
        """`wait`: the seconds that the relay waits, from its first word on."""
        if not self.booting and isinstance(wait, int | float) and 0 <= wait <= WAIT_MOST:
            self.most = time.monotonic() - self._since + wait + ANSWER_GRACE
        self.booting = True
        self._text = printable(untrusted_text, 200)
        self.show()

    def show(self) -> None:
        passed = time.monotonic() - self._since
        if not self._wanted or passed < SHOW_AFTER:
            return
        text = self._text
        if not self.booting:
            text = self._ask() or text
        try:
            columns = os.get_terminal_size(2).columns or 80
        except OSError:
            return
        clock = f" ({int(passed)} s)"
        line = f"{self._program}: starting {self._name}: {text}"[: max(columns - 1 - len(clock), 0)]
        write_stderr("\r" + line + clock + "\x1b[K")
        self._shown = True

    def _ask(self) -> str:
        from vmsilo.startup import StatusWatch, draw_bar  # late: a warm VM answers before

        self._watch = self._watch or StatusWatch(self._name, self._place)
        return draw_bar(self._watch.read())

    def erase(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._shown:
            write_stderr("\r\x1b[K")
            self._shown = False


def dial(program: str, name: str, place: Place, *, wait: int | None) -> int:
    """A non-blocking descriptor connected to the agent. SocketClosedError if nobody answers.

    `wait` in seconds for a VM that has to start; None: as it is configured.
    """
    most = (WAIT_MOST if wait is None else wait) + ANSWER_GRACE
    began = time.monotonic()
    progress = Progress(program, name, began, place)
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    try:
        _connect(sock, name, place)
        sock.settimeout(SHOW_AFTER)
        _send_request(sock, wait)
        while True:
            limit = (progress.most or most) if progress.booting else min(most, SILENCE_MOST)
            if time.monotonic() - began > limit:
                raise ClientError(
                    f"VM '{name}' gave no connection within {limit:.0f} s",
                    "systemctl status vmsilo-relayd; journalctl -u vmsilo-" + name + "-vm",
                )
            progress.show()
            fd = _receive(sock, name, progress)
            if fd is not None:
                os.set_blocking(fd, False)
                return fd
    finally:
        progress.erase()
        sock.close()


def _connect(sock: "_socket.socket", name: str, place: Place) -> None:
    path = socket_path(name, place)
    try:
        sock.connect(path)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as exc:
        raise SocketClosedError(f"no command socket for VM '{name}'") from exc
    except PermissionError as exc:
        raise ClientError(f"VM '{name}' belongs to another user", f"ls -l {path}") from exc
    except OSError as exc:
        raise ClientError(f"cannot connect to {path}: {exc.strerror}") from exc


def _send_request(sock: "_socket.socket", wait: int | None) -> None:
    seconds = b"null" if wait is None else b"%d" % wait
    try:
        sock.send(b'{"v":1,"op":"connect","wait":%b}' % seconds)
    except OSError as exc:
        raise SocketClosedError(f"the command socket closed: {exc.strerror}") from exc


def _receive(sock: "_socket.socket", name: str, progress: Progress) -> int | None:
    """One packet: the descriptor, or None if there is more to wait for."""
    try:
        data, ancillary, _flags, _address = sock.recvmsg(
            PACKET_MAX, _socket.CMSG_SPACE(4 * FDS_MAX), _socket.MSG_CMSG_CLOEXEC
        )
    except TimeoutError:
        return None
    except OSError as exc:
        raise SocketClosedError(f"the command socket closed: {exc.strerror}") from exc
    fds = take_fds(ancillary)
    try:
        if not data:
            raise SocketClosedError(f"the command socket of VM '{name}' closed without an answer")
        try:
            reply = load_json(data)
        except ProtocolError as exc:
            raise ClientError(f"vmsilo-relayd sent an answer that is not one: {exc}") from exc
        if reply.get("ok") is True:
            if not fds:
                raise ClientError("vmsilo-relayd answered without a connection")
            return fds.pop(0)
        if "error" in reply:
            raise _refusal(name, reply["error"], booting=progress.booting)
        progress.say(str(reply.get("text", "")), reply.get("wait"))
        return None
    finally:
        for fd in fds:
            os.close(fd)


def take_fds(ancillary: "list[tuple[int, int, bytes]]") -> list[int]:
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            fds += struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])
    return fds


def _refusal(name: str, error: "Any", *, booting: bool) -> ClientError:
    if not isinstance(error, dict):
        return ClientError(f"vmsilo-relayd refused VM '{name}'")
    fact = printable(error.get("message") or error.get("code") or "refused")
    if error.get("code") == "stopping":
        # If it was going when we came, a new start is what is wanted.
        return StoppedMeanwhileError(f"VM '{name}': {fact}") if booting else SocketClosedError(fact)
    return ClientError(f"VM '{name}': {fact}", printable(error.get("hint") or ""))
