"""One VM's console: its listener, the run it has or had, and its clients.

Owned by the table. The master side of the run's terminal is read whenever it has something, whoever
watches, so the VMM never waits for a reader; what was read is kept in the ring, logged by line, and shown.
Only what the writer sends goes to the guest.
"""

from __future__ import annotations

import fcntl
import os
import struct

from vmsilo_relay.journal import ERROR, INFO
from vmsilo_relay.listener import Listener
from vmsilo_relay.loop import READ, WRITE
from vmsilo_relay.packet import Refusal

from vmsilo_console.client import NO, TAKE, admit_client

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmsilo_console.client import Client
    from vmsilo_console.context import Context
    from vmsilo_console.ring import Ring
    from vmsilo_console.unitlog import UnitLog

TIOCGPTN = 0x80045430  # ioctl_tty(2): only the master side of a pseudo-terminal has a number
READS_PER_WAKEUP = 8


class Console:
    """`on_ended(console)` is called when the run ends by itself."""

    def __init__(self, context: Context, name: str, on_ended: Callable[[Console], None]) -> None:
        self._context = context
        self._on_ended = on_ended
        self.name = name
        self.owner: int | None = None
        self.generation: str | None = None
        self.ring: Ring | None = None
        self.clients: list[Client] = []  # the longest attached first
        self.writer: Client | None = None
        self._listener: Listener | None = None
        self._master: int | None = None
        self._log: UnitLog | None = None
        self._input = b""

    @property
    def listening(self) -> bool:
        return self._listener is not None

    @property
    def running(self) -> bool:
        return self._master is not None

    def listen(self, sock: socket.socket, owner: int) -> None:
        """Take the listener, in place of the one before; clients of another owner than before leave."""
        if self._listener is not None:
            self._listener.close()
        self.owner = owner

        def admit(client: socket.socket, _address: object) -> None:
            admit_client(self._context, self, client)

        self._listener = Listener(self._context, self.name, sock, admit)
        for client in tuple(self.clients):
            if client.uid not in (0, owner):
                client.end("removed")

    def attach(self, master: int, ring: Ring, log: UnitLog) -> None:
        """Take a run's terminal, in place of the one before."""
        self._let_go()
        os.set_blocking(master, False)
        self._master, self._log = master, log
        self.ring = ring
        self._watch()

    def end_run(self, reason: str) -> None:
        """Close the run's descriptors; its scroll-back stays."""
        self._let_go()
        self.writer = None
        for client in tuple(self.clients):
            client.end(reason)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self.end_run("removed")
        self.ring = None

    def put_input(self, untrusted_data: bytes) -> None:
        """Give input to the guest; the writer pauses where the guest does not take it."""
        if self._master is not None:
            self._input += untrusted_data
            self._write_input()

    def choose_writer(self, client: Client) -> None:
        """`client` attaches: it writes if it takes that over, or if nobody does and it asks."""
        if self._master is None or client.write == NO:
            return
        if self.writer is None or client.write == TAKE:
            self._set_writer(client)

    def describe_writer(self, client: Client) -> tuple[bool, int | None]:
        return self.writer is client, None if self.writer is None else self.writer.pid

    def leave(self, client: Client) -> None:
        """A client is gone."""
        if client in self.clients:
            self.clients.remove(client)
        self.resign(client)

    def resign(self, client: Client) -> None:
        """If `client` was the writer, the longest attached of those who would write is the next."""
        client.write = NO
        if self.writer is client:
            self._set_writer(next((other for other in self.clients if other.write != NO), None))

    def _set_writer(self, client: Client | None) -> None:
        before, self.writer = self.writer, client
        self._input = b""  # nobody else's half a line is to stand before the new writer's
        self._watch()
        if before is not None:
            before.resume()
        for other in tuple(self.clients):
            other.show()

    def _watch(self) -> None:
        if self._master is not None:
            events = READ | WRITE if self._input else READ
            self._context.loop.watch(self._master, events, self._on_event, self._fail)

    def _on_event(self, events: int) -> None:
        if events & READ:
            for _ in range(READS_PER_WAKEUP):
                if not self._read_output():
                    break
            for client in tuple(self.clients):
                client.show()
        if events & WRITE and self._input:
            self._write_input()

    def _read_output(self) -> bool:
        """Take what the guest wrote; False when there is no more."""
        if self._master is None or self.ring is None or self._log is None:
            return False
        position = self.ring.total
        try:
            count = self.ring.fill(self._master)
        except BlockingIOError:
            return False
        except OSError:
            count = 0  # EIO: nobody has the other side open any more
        if not count:
            self._context.journal.log(INFO, self.name, "the console's run has ended")
            self.end_run("ended")
            self._on_ended(self)
            return False
        self._log.feed(self.ring.read(position, count))
        return True

    def _write_input(self) -> None:
        assert self._master is not None
        try:
            written = os.write(self._master, self._input)
        except BlockingIOError:
            written = 0
        except OSError:
            written = len(self._input)  # the run has ended, as reading will show
        self._input = self._input[written:]
        self._watch()
        if self.writer is not None:
            if self._input:
                self.writer.pause()
            else:
                self.writer.resume()

    def _let_go(self) -> None:
        master, self._master = self._master, None
        log, self._log = self._log, None
        if master is not None:
            self._context.loop.forget(master)
            os.close(master)
        if log is not None:
            log.close()
        self._input = b""
        if self.writer is not None:
            self.writer.resume()

    def _fail(self, error: Exception) -> None:
        """Never the run's end: the VMM would wait for a reader for ever."""
        self._context.journal.log(ERROR, self.name, f"serving the console failed: {error!r}")


def check_master(fd: int) -> None:
    """Raises Refusal unless `fd` is the master side of a pseudo-terminal."""
    try:
        fcntl.ioctl(fd, TIOCGPTN, struct.pack("I", 0))
    except OSError as exc:
        raise Refusal("bad-request", "the descriptor is not the master side of a terminal") from exc
