"""The control socket: where launchers ask for what they execute, a stopping unit for its guest's shutdown,
and a forwarder for its ports.

Serves /run/vmsilo/control.sock (bound by systemd) on the GLib loop. Anybody may connect; a peer is served
only when the kernel says that it is a process of a VM's own unit, and only for that VM. One request per
connection. It knows nothing of VMs: it maps packets to the calls of `Handler`.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gi.repository import GLib

from vmsilod import closing, loop
from vmsilod.errors import BadRequest, VmsiloError
from vmsilod.waiting import readable

if TYPE_CHECKING:
    from vmsilod.vmm.launch import Launch

log = logging.getLogger(__name__)

MAX_REQUEST = 4096
MAX_REQUEST_FDS = 4
MAX_PEERS_PER_UNIT = 4
ACCEPTS_PER_TURN = 16  # anybody may connect: a flood gets its share of the loop and not more
PAUSE_SECONDS = 0.5
REQUEST_SECONDS = 10.0
UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7) SO_PEERCRED
UNIT_PATTERN = re.compile(
    r"vmsilo-([a-z][a-z0-9-]{0,30})-"
    r"(vm|debug|forward|debugforward|(?:share|debugshare)(?=@))(?:(?<=share)@[A-Za-z0-9._-]{1,35})?\.service"
)
# Nobody who only copies what strangers send may ask for a VM.
OPERATIONS = {
    "vm": ("prepare", "stop"),
    "debug": ("prepare", "stop"),
    "forward": ("forward",),
    "debugforward": ("forward",),
    "share": ("share",),
    "debugshare": ("share",),
}
TAKE_DESCRIPTORS = ("prepare", "share", "share again")


@dataclass(frozen=True)
class Peer:
    """The process that asks: a member of the unit `unit`, which belongs to the VM `name`."""

    pid: int
    uid: int
    gid: int
    name: str
    unit: str


@dataclass(frozen=True)
class Prepared:
    """What the launcher executes. `stdio` are indexes into launch.fds for 0, 1, 2; `close` are ours to
    close after sending.
    """

    launch: Launch
    stdio: tuple[int, ...] = ()
    close: tuple[int, ...] = field(default=())


class Handler(Protocol):
    async def prepare(self, peer: Peer, fds: list[int]) -> Prepared: ...

    async def shut_down(self, peer: Peer) -> dict[str, Any]: ...

    async def forward(self, peer: Peer, *, listening: bool) -> tuple[dict[str, Any], list[int]]: ...

    async def share(
        self, peer: Peer, fds: list[int], *, listening: bool
    ) -> tuple[dict[str, Any], list[int]]: ...


def find_unit(pid: int, proc: Path = Path("/proc")) -> tuple[str, str] | None:
    """(VM name, unit) of a process, by its cgroup; None for a process of any other unit."""
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        # "0::/vmsilo.slice/UNIT" (v2) or "1:name=systemd:/..." where the host still has a v1 hierarchy.
        hierarchy, controllers, path = line.split(":", 2)
        if (hierarchy == "0" and not controllers) or controllers == "name=systemd":
            # Only the first that is not a slice is a unit of the system's: below it, whoever the cgroup
            # was delegated to (any user's own service manager) gives names at will.
            unit = next((part for part in path.split("/") if part and not part.endswith(".slice")), "")
            match = UNIT_PATTERN.fullmatch(unit)
            if match:
                return match[1], unit
    return None


def identify(sock: socket.socket) -> Peer | None:
    pid, uid, gid = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    found = find_unit(pid)
    return Peer(pid, uid, gid, *found) if found else None


def uid_of(sock: socket.socket) -> int:
    _, uid, _ = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return int(uid)


class ControlServer:
    """Accepts on a listening socket until closed."""

    def __init__(self, listener: socket.socket, handler: Handler) -> None:
        self._listener = listener
        self._handler = handler
        self._peers: Counter[str] = Counter()
        listener.settimeout(0)
        self._watch = 0
        self._resume()

    def close(self) -> None:
        if self._watch:
            GLib.source_remove(self._watch)
        self._listener.close()

    def _resume(self) -> None:
        self._watch = loop.watch_fd(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # Out of descriptors, most likely: the listener stays readable, and the loop must not spin.
                log.error("cannot accept a launcher, trying again soon: %s", error.strerror)
                GLib.source_remove(self._watch)
                self._watch = 0
                loop.call_later(PAUSE_SECONDS, self._resume)
                return
            peer = identify(sock)
            if peer is None or self._peers[peer.unit] >= MAX_PEERS_PER_UNIT:
                # What a stranger has sent along is closed with it.
                closing.close_later(peer.unit if peer else uid_of(sock), [sock])
                continue
            sock.settimeout(0)
            self._peers[peer.unit] += 1
            loop.spawn(self._serve(sock, peer))

    async def _serve(self, sock: socket.socket, peer: Peer) -> None:
        try:
            if await readable(sock.fileno(), REQUEST_SECONDS):
                await self._answer(sock, peer)
        except OSError as error:
            log.info("launcher of %s went away: %s", peer.name, error.strerror)
        finally:
            closing.close_later(peer.unit, [sock])
            self._peers[peer.unit] -= 1
            if not self._peers[peer.unit]:
                del self._peers[peer.unit]

    async def _answer(self, sock: socket.socket, peer: Peer) -> None:
        # All that there can be: the kernel would close the rest on this thread.
        data, fds, _, _ = socket.recv_fds(sock, MAX_REQUEST, closing.PACKET_FDS_MAX)
        room = closing.receive(peer.unit, len(fds))
        prepared: Prepared | None = None
        handed: list[int] = []
        try:
            operation = parse_operation(data, peer)
            if fds and not (room and operation in TAKE_DESCRIPTORS and len(fds) <= MAX_REQUEST_FDS):
                raise BadRequest(f"unit {peer.unit} sent descriptors that nobody asked for")
            if operation == "stop":
                reply = await self._handler.shut_down(peer)
            elif operation.startswith("forward"):
                reply, handed = await self._handler.forward(peer, listening=operation == "forward again")
            elif operation.startswith("share"):
                reply, handed = await self._handler.share(peer, fds, listening=operation == "share again")
            else:
                prepared = await self._handler.prepare(peer, fds)
                launch = prepared.launch
                reply = {
                    "argv": launch.argv,
                    "env": dict(launch.env),
                    "stdio": prepared.stdio,
                    "own_terminal": launch.own_terminal and bool(prepared.stdio),
                }
        except VmsiloError as error:
            log.warning("VM %s: %s", peer.name, error)
            reply = {"error": {"code": error.code, "message": str(error), "hint": error.hint}}
        finally:
            closing.close_received(peer.unit, fds)
        try:
            # A packet this small to a fresh socket never blocks: the launcher sits in recvmsg.
            passed = prepared.launch.fds if prepared else tuple(handed)
            socket.send_fds(sock, [json.dumps(reply).encode()], passed)
        finally:
            # The terminal of a debug run is the caller's file. Not in the queue of what the unit has sent.
            closing.close_later(f"sent to {peer.unit}", prepared.close if prepared else handed)


def parse_operation(untrusted_data: bytes, peer: Peer) -> str:
    """ "prepare", "stop", "forward" or "share"; the latter two with " again" from one that listens. For the
    peer's own VM.
    """
    try:
        request = json.loads(untrusted_data)
        operation, name = request["op"], request["name"]
        again = operation in ("forward", "share") and request["listening"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadRequest("the launcher's request cannot be read") from error
    match = UNIT_PATTERN.fullmatch(peer.unit)
    if match is None or operation not in OPERATIONS[match[2]] or name != peer.name:
        raise BadRequest(f"unit {peer.unit} asked for something that is not its own")
    return f"{operation} again" if again else str(operation)
