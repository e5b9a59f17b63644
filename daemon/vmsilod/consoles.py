"""The VMs' consoles, as far as vmsilod has to do with them: it opens the terminal pair of each run,
binds each VM's `/run/vmsilo/NAME-console`, and hands both to vmsilo-consoled.

Called by runs.py when a VM starts and ends, and by main whenever the configuration was taken over or
consoled came back. It keeps nothing that consoled is not told, and never reads what a guest wrote: the
master side goes to consoled unread. Lives as long as the process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import termios
import tty
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsilod import loop
from vmsilod.bus.views import VmRemoved, VmView
from vmsilod.errors import Failed, VmsiloError
from vmsilod.host import find_uid
from vmsilod.order_socket import OrderSocket
from vmsilod.resources import rundir
from vmsilod.vmm.launch import Console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsilod.bus.views import Change
    from vmsilod.registry import Registry, Vm

log = logging.getLogger(__name__)

PROGRAM = "vmsilo-consoled"
SOCKET_PATH = "/run/vmsilo/console.sock"
RUN = Path("/run/vmsilo")
SUFFIX = "-console"
ENDED = ("stopped", "failed", "broken")
OPEN_SECONDS = 5.0
"""A console is worth no more of a VM's start than this."""


class Consoles:
    """What consoled is to have: a listener per configured VM, a terminal per running one."""

    def __init__(self, registry: Registry, path: str = SOCKET_PATH, run: Path = RUN) -> None:
        self._registry = registry
        self._run = run
        self._agreeing = False
        self._again = False
        self._orders = OrderSocket(PROGRAM, path, lambda _event: None, self.agree_soon)
        self.connect = self._orders.open

    async def open(self, name: str, generation: str, journal: int | None) -> list[int]:
        """Descriptors for the VMM's standard input and output, the caller's; [] where there is no console.

        `journal` is a stream into the unit's own journal, for the guest's lines.
        """
        master, slave = await loop.in_worker(open_terminal)
        fds = [master] if journal is None else [master, journal]
        names = ["master", "journal"][: len(fds)]
        request = {"op": "open", "name": name, "generation": generation, "fds": names}
        try:
            await loop.with_deadline(self._orders.order(request, fds), OPEN_SECONDS)
            return [slave, os.dup(slave)]
        except (VmsiloError, TimeoutError) as error:
            log.warning("VM %s runs without a console: %s", name, error)
            os.close(slave)
            return []
        finally:
            os.close(master)

    async def close(self, name: str, generation: str) -> None:
        await self._tell({"op": "close", "name": name, "generation": generation})

    def vm_changed(self, change: Change) -> None:
        """A VM that has ended may have another owner now, or be gone."""
        if isinstance(change, VmRemoved) or (isinstance(change, VmView) and change.state in ENDED):
            self.agree_soon()

    def agree_soon(self) -> None:
        """Make consoled's listeners and runs those of the registry."""
        self._again = True
        if not self._agreeing:
            self._agreeing = True  # now: what is spawned begins later
            loop.spawn(self._agree())

    async def _agree(self) -> None:
        try:
            while self._again:
                self._again = False
                await self._agree_once()
        except VmsiloError as error:
            log.info("consoles: %s", error)  # after the next connection it is done again
        finally:
            self._agreeing = False

    async def _agree_once(self) -> None:
        answer = await self._orders.order({"op": "list"})
        known = {entry["name"]: entry for entry in answer["vms"]}
        for vm in list(self._registry):
            entry = known.pop(vm.name, None)
            owner = owner_of(vm)
            if owner is not None and not (
                entry and entry["listening"] and entry["owner"] == owner and self._is_bound(vm.name, owner)
            ):
                await self._listen(vm.name, owner)
            if entry and entry["generation"] and not runs(vm, entry["generation"]):
                await self.close(vm.name, entry["generation"])
        for name in known:
            await self._tell({"op": "forget", "name": name})
        wanted = {vm.name for vm in self._registry}
        await loop.in_worker(remove_sockets, self._run, frozenset(wanted))

    async def _listen(self, name: str, owner: int) -> None:
        path = self._run / f"{name}{SUFFIX}"
        listener = await loop.in_worker(bind_fresh, path, owner)
        try:
            await self._tell({"op": "listen", "name": name, "owner": owner}, [listener])
        finally:
            os.close(listener)

    def _is_bound(self, name: str, owner: int) -> bool:
        try:
            return (self._run / f"{name}{SUFFIX}").lstat().st_uid == owner
        except OSError:
            return False

    async def _tell(self, request: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """An order that the next agreement repeats when it is lost."""
        try:
            await self._orders.order(request, fds)
        except VmsiloError as error:
            log.info("VM %s: consoled did not take %s: %s", request["name"], request["op"], error)


def runs(vm: Vm, generation: str) -> bool:
    return vm.lock.held or (vm.record is not None and vm.record.invocation == generation)


def owner_of(vm: Vm) -> int | None:
    """The uid of the one who may have the console; None for a VM that is not configured.

    What runs belongs to whom it was started for, whatever the files say by now.
    """
    config = vm.started or vm.config
    with contextlib.suppress(VmsiloError):
        return find_uid(config.user) if config is not None else None
    return None


def console_of(vm: Vm, terminals: Sequence[int]) -> Console:
    if not terminals:
        return Console.NONE
    return Console.STDIO if vm.debug else Console.VIRTIO


def open_terminal() -> tuple[int, int]:
    """(master, slave) of a new pseudo-terminal that changes no byte and echoes nothing."""
    master, slave = os.openpty()
    tty.setraw(slave)
    # QEMU switches output processing (OPOST) on again: then none of it is to be left.
    settings = termios.tcgetattr(slave)
    settings[tty.OFLAG] = 0
    termios.tcsetattr(slave, termios.TCSANOW, settings)
    return master, slave


def bind_fresh(path: Path, owner: int) -> int:
    """A listening socket at `path`, in place of what is there: whoever finds it there can connect."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    listener = rundir.bind_listener(fresh, socket.SOCK_SEQPACKET, 0o600, (owner, 0))
    try:
        fresh.rename(path)
    except OSError as error:
        os.close(listener)
        fresh.unlink(missing_ok=True)
        raise Failed(f"cannot make {path}: {error.strerror}") from error
    return listener


def remove_sockets(run: Path, wanted: frozenset[str]) -> None:
    for path in run.glob(f"*{SUFFIX}"):
        if path.name.removesuffix(SUFFIX) not in wanted and stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink(missing_ok=True)


def split_passed(fds: Sequence[int]) -> tuple[list[int], int | None]:
    """What a launcher passed: its listening sockets, and the stream into its unit's journal.

    That stream ends in a process of the launcher's unit, under the VM's uid: whatever it is, it says nothing
    in another's name.
    """
    listeners: list[int] = []
    journal = None
    for fd in fds:
        if is_stream(fd):
            journal = fd
        else:
            listeners.append(fd)
    return listeners, journal


def is_stream(fd: int) -> bool:
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    with socket.socket(fileno=os.dup(fd)) as sock:
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM and not listening
