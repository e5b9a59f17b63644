"""The connection to vmsilo-consoled for one VM's console: a packet's type is its first byte.

Owns the socket. Called by `console`. What comes as output is the guest's and hostile; everything else is
consoled's word.
"""

import _socket

from vmsilo_wire import ProtocolError
from vmsilo_wire.payload import dump_json, load_json

from vmsilo.errors import ClientError, printable
from vmsilo.names import console_path
from vmsilo.place import Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

STATE, OUTPUT, HISTORY_END, LOST, WRITER, END, REFUSED = b"S", b"O", b"H", b"L", b"W", b"E", b"X"
ATTACH, INPUT = b"A", b"I"
INPUT_MAX = 4096
PACKET_MAX = 64 * 1024
SERVICE_HINT = "systemctl status vmsilo-consoled"


class ConsoleAbsentError(ClientError):
    """Nobody listens at the VM's console socket: only vmsilod knows why."""


class ConsoleSocket:
    __slots__ = ("_sock",)

    def __init__(self, name: str, place: Place, *, history: bool, write: str) -> None:
        """Asks; the first answer is STATE or REFUSED. `write`: ask, take or no."""
        self._sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
        try:
            self._connect(name, place)
            self._ask({"history": history, "write": write})
            self._sock.settimeout(0)
        except OSError as exc:
            self._sock.close()
            raise ClientError(f"the console of VM '{name}' closed: {exc.strerror}", SERVICE_HINT) from exc
        except BaseException:
            self._sock.close()
            raise

    def _connect(self, name: str, place: Place) -> None:
        path = console_path(name, place)
        self._sock.settimeout(10)
        try:
            self._sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as exc:
            raise ConsoleAbsentError(f"VM '{name}' has no console socket", SERVICE_HINT) from exc
        except PermissionError as exc:
            raise ClientError(f"VM '{name}' belongs to another user", f"ls -l {path}") from exc

    def _ask(self, request: "dict[str, Any]") -> None:
        try:
            self._sock.send(ATTACH + dump_json(request))
        except (BrokenPipeError, ConnectionResetError):
            return  # refused before it asked: the reason is there to be read

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive(self) -> tuple[bytes, bytes] | None:
        """(type, payload); None if there is nothing now; an empty type is the end of the connection."""
        try:
            packet = self._sock.recv(PACKET_MAX)
        except BlockingIOError:
            return None
        except OSError:
            packet = b""
        return packet[:1], packet[1:]

    def send_input(self, data: bytes) -> int:
        """How much of it was taken; all if the connection has ended, which reading tells."""
        sent = 0
        while sent < len(data):
            piece = data[sent : sent + INPUT_MAX]
            try:
                self._sock.send(INPUT + piece)
            except BlockingIOError:
                return sent
            except OSError:
                return len(data)
            sent += len(piece)
        return sent

    def close(self) -> None:
        self._sock.close()


def parse(payload: bytes) -> "dict[str, Any]":
    try:
        return load_json(payload)
    except ProtocolError as exc:
        raise ClientError(f"vmsilo-consoled sent an answer that is not one: {exc}") from exc


def refusal(name: str, payload: bytes) -> ClientError:
    error = parse(payload)
    fact = printable(error.get("message") or error.get("code") or "refused")
    return ClientError(f"VM '{name}': {fact}", printable(error.get("hint") or ""))


def explain_absence(name: str, place: Place, absent: ConsoleAbsentError) -> ClientError:
    """Whether there is such a VM at all."""
    from vmsilo.bus import Bus, check_known

    try:
        bus = Bus(place)
        try:
            vm = check_known(bus, name, place)
        finally:
            bus.close()
    except ClientError as failed:
        return failed
    if vm.get("State") == "broken":
        return ClientError(f"VM '{name}' has a broken configuration", "vmsilo check")
    return absent
