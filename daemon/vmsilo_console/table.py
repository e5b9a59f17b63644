"""The table of consoles: what vmsilod orders, and what comes back after a restart. Keeps systemd's
descriptor store and the state directory in step with it.

Built by `main`, called by the control side. A crash or restart at any point stops no VM and loses no
scroll-back: descriptors are stored and the state is written before vmsilod gets its answer.
"""

from __future__ import annotations

import os
import socket

from vmsilo_relay.journal import ERROR, INFO, WARNING
from vmsilo_relay.listener import check_listener
from vmsilo_relay.packet import Refusal, check_keys, parse_object, take_int, take_str
from vmsilo_relay.record import (
    UID_MAX,
    check_generation,
    check_name,
    delete_record,
    load_states,
    save_state,
)

from vmsilo_console.console import Console, check_master
from vmsilo_console.ring import Ring, create_memory
from vmsilo_console.unitlog import UnitLog

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsilo_relay.systemd import Notifier

    from vmsilo_console.context import Context

LISTENER, MASTER, JOURNAL, RING = KINDS = ("listen", "master", "journal", "ring")


class State:
    """What the state file says of one VM."""

    __slots__ = ("generation", "name", "owner", "running")

    def __init__(self, name: str, owner: int | None, generation: str | None, *, running: bool) -> None:
        self.name = name
        self.owner = owner
        self.generation = generation
        self.running = running


class Consoles:
    def __init__(self, context: Context, notifier: Notifier, directory: str) -> None:
        self._context = context
        self._notifier = notifier
        self._directory = directory
        self.consoles: dict[str, Console] = {}

    def listen(self, name: str, owner: int, fd: int) -> None:
        """Take a listener, which replaces the one before; raises Refusal and takes nothing.

        A new owner is not shown what ran for the one before.
        """
        sock = open_listener(fd)
        try:
            console = self._find_or_add(name)
        except Refusal:
            sock.detach()
            raise
        self._notifier.store(f"{LISTENER}-{name}", fd)
        if console.owner != owner and not console.running:
            console.ring = None
            self._store_or_drop(RING, name, None)
        console.listen(sock, owner)
        self._save(console)

    def open(self, name: str, generation: str, master: int, journal: int | None) -> None:
        """Take a new run; raises Refusal and takes nothing. The same run again keeps its scroll-back."""
        check_master(master)
        if journal is not None:
            check_stream(journal)
        console = self._find_or_add(name)
        if console.ring is None or console.generation != generation:
            console.end_run("ended")
            console.ring = self._create_ring(name)
        console.generation = generation
        self._store_or_drop(MASTER, name, master)
        self._store_or_drop(JOURNAL, name, journal)
        self._attach(console, console.ring, master, journal)
        self._save(console)
        self._context.journal.log(INFO, name, f"run {generation} has a console")

    def close(self, name: str, generation: str) -> None:
        """This run has ended; nothing happens if it is not the one that is there."""
        console = self.consoles.get(name)
        if console is None or console.generation != generation:
            return
        console.generation = None
        if console.running:
            console.end_run("ended")
        self._settle(console)

    def forget(self, name: str) -> None:
        console = self.consoles.pop(name, None)
        if console is None:
            return
        console.close()
        for kind in KINDS:
            self._store_or_drop(kind, name, None)
        try:
            delete_record(self._directory, name)
        except OSError as error:
            self._context.journal.log(ERROR, name, f"can't delete the state file, ignoring: {error}")
        self._context.journal.forget(name)

    def describe(self) -> list[dict[str, object]]:
        return [
            {
                "name": console.name,
                "owner": console.owner,
                "listening": console.listening,
                "generation": console.generation,
                "running": console.running,
            }
            for console in self.consoles.values()
        ]

    def restore(self, inherited: list[tuple[str, int]]) -> None:
        """Go on after a restart with the stored descriptors; what does not fit is closed and forgotten."""
        stored: dict[str, int] = {}
        for label, fd in inherited:
            if label in stored:
                os.close(stored[label])
            stored[label] = fd
        for name, state in load_states(self._directory, parse_state):
            found = {kind: stored.pop(f"{kind}-{name}") for kind in KINDS if f"{kind}-{name}" in stored}
            if isinstance(state, Refusal):
                self._context.journal.log(WARNING, name, f"forgotten after a restart: {state.message}")
                state = State(name, None, None, running=False)
            self._restore_console(state, found)
            for kind, fd in found.items():
                self._discard(f"{kind}-{name}", fd)
        for label, fd in stored.items():
            self._discard(label, fd)

    def _restore_console(self, state: State, found: dict[str, int]) -> None:
        """Takes out of `found` what is of use."""
        console = self._find_or_add(state.name)
        console.generation = state.generation
        console.owner = state.owner
        if state.owner is not None and LISTENER in found:
            try:
                sock = open_listener(found[LISTENER])
            except Refusal as refusal:
                self._context.journal.log(WARNING, state.name, refusal.message)
            else:
                del found[LISTENER]
                console.listen(sock, state.owner)
        if RING in found:
            try:
                console.ring = Ring(found[RING])
                os.close(found.pop(RING))
            except (OSError, ValueError) as error:
                self._context.journal.log(WARNING, state.name, f"the scroll-back is lost: {error}")
        if state.running:
            self._restore_run(console, found)
        if not console.running:
            self._settle(console)
        if not (console.listening or console.ring or console.running):
            self.forget(console.name)

    def _restore_run(self, console: Console, found: dict[str, int]) -> None:
        try:
            if MASTER not in found:
                raise Refusal("failed", "its terminal is not there")
            check_master(found[MASTER])
            if JOURNAL in found:
                check_stream(found[JOURNAL])
            ring = console.ring or self._create_ring(console.name)
        except Refusal as refusal:
            text = f"the console is lost after a restart: {refusal.message}"
            self._context.journal.log(WARNING, console.name, text)
            return
        self._attach(console, ring, found.pop(MASTER), found.pop(JOURNAL, None))

    def _attach(self, console: Console, ring: Ring, master: int, journal: int | None) -> None:
        stream = None if journal is None else socket.socket(fileno=journal)
        console.attach(master, ring, UnitLog(self._context, console.name, stream))

    def _find_or_add(self, name: str) -> Console:
        console = self.consoles.get(name)
        if console is None:
            if len(self.consoles) >= self._context.limits.vms:
                raise Refusal("busy", f"there are {len(self.consoles)} consoles already")
            console = self.consoles[name] = Console(self._context, name, self._settle)
        return console

    def _create_ring(self, name: str) -> Ring:
        try:
            memory = create_memory()
        except OSError as exc:
            raise Refusal("failed", f"no memory for the scroll-back: {exc.strerror}") from exc
        try:
            ring = Ring(memory)
            self._store_or_drop(RING, name, memory)
            return ring
        except OSError as exc:
            raise Refusal("failed", f"no memory for the scroll-back: {exc.strerror}") from exc
        finally:
            os.close(memory)

    def _store_or_drop(self, kind: str, name: str, fd: int | None) -> None:
        if fd is None:
            self._notifier.drop(f"{kind}-{name}")
        else:
            self._notifier.store(f"{kind}-{name}", fd)

    def _settle(self, console: Console) -> None:
        """A run has ended: systemd is to keep its terminal open no longer."""
        self._store_or_drop(MASTER, console.name, None)
        self._store_or_drop(JOURNAL, console.name, None)
        self._save(console)

    def _save(self, console: Console) -> None:
        state: dict[str, object] = {
            "name": console.name,
            "owner": console.owner,
            "generation": console.generation,
            "running": console.running,
        }
        try:
            save_state(self._directory, console.name, state)
        except OSError as error:
            self._context.journal.log(ERROR, console.name, f"can't write the state file, ignoring: {error}")

    def _discard(self, label: str, fd: int) -> None:
        self._context.journal.log(WARNING, "consoled", f"stored descriptor {label!a} closed: of no use")
        self._notifier.drop(label)
        os.close(fd)


def parse_state(data: bytes) -> State:
    """The State in a state file; raises Refusal."""
    state = parse_object(data)
    check_keys(state, ("name", "owner", "generation", "running"))
    owner = None if state["owner"] is None else take_int(state, "owner", 0, UID_MAX)
    generation = None
    if state["generation"] is not None:
        generation = check_generation(take_str(state, "generation", 128))
    name = check_name(take_str(state, "name", 31))
    return State(name, owner, generation, running=state["running"] is True)


def open_listener(fd: int) -> socket.socket:
    """The listening socket `fd`; raises Refusal and leaves the descriptor open."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as exc:
        raise Refusal("bad-request", "the descriptor is not a socket") from exc
    try:
        check_listener(sock, socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except Refusal:
        sock.detach()
        raise
    return sock


def check_stream(fd: int) -> None:
    """Raises Refusal unless `fd` is a connected Unix stream, as the journal's are."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as exc:
        raise Refusal("bad-request", "the journal descriptor is not a socket") from exc
    try:
        sock.getpeername()
        kind = (sock.family, sock.type)
    except OSError as exc:
        raise Refusal("bad-request", "the journal stream is not connected") from exc
    finally:
        sock.detach()
    if kind != (socket.AF_UNIX, socket.SOCK_STREAM):
        raise Refusal("bad-request", "the journal descriptor is not a Unix stream")
