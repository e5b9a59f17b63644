"""One VM in relayd's table: its record, its listeners and those who wait for it.

Created by `Relay.add` and on restore, closed by `Relay`. Turns what the guest said into state, at a bounded
rate. Never sends to the guest.
"""

from __future__ import annotations

from vmsilo_wire.payload import encode_hello

from vmsilo_relay.journal import ERROR, INFO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmsilo_relay.command import CommandClient
    from vmsilo_relay.context import Context
    from vmsilo_relay.errand import Errand
    from vmsilo_relay.forwarder import ForwarderLink
    from vmsilo_relay.hostport import Message
    from vmsilo_relay.listener import Listener
    from vmsilo_relay.loop import Timer
    from vmsilo_relay.record import Record

    Announce = Callable[["Vm", str], None]


SAVE = "save"


class Vm:
    """`announce(vm, event)` is called for "agent", "ready", "down", "status", and SAVE, which only saves."""

    def __init__(self, context: Context, record: Record, announce: Announce) -> None:
        self._context = context
        self._announce = announce
        self.record = record
        self.clients: set[CommandClient | Errand | ForwarderLink] = set()
        self.listeners: list[Listener] = []
        self.forwarder: ForwarderLink | None = None
        self._agent_began = False  # and the forwarder was not told yet
        self._publishing: Timer | None = None
        self._published = record.status
        self._settling: Timer | None = None
        self._announced = (record.agent, record.agent and record.ready)

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def ready(self) -> bool:
        return self.record.agent and self.record.ready

    def hello(self, role: str) -> bytes:
        """The first frame to the agent, which proves that this is the relay of this boot."""
        return encode_hello(role, self.record.secret)

    def hear(self, message: Message) -> None:
        """Take in what the guest said; waiting clients go on when this makes it ready."""
        record = self.record
        before = (record.agent, record.ready)
        if message.status is not None:
            record.status = message.status
        if message.agent is not None:
            record.agent = message.agent
            self._agent_began = self._agent_began or message.agent
        if message.ready is not None:
            record.ready = message.ready
        if (record.agent, record.ready) != before:
            self._announce(self, SAVE)
        if self._settling is None:
            self._announce_changes()
        if record.status != self._published and self._publishing is None:
            loop, limits = self._context.loop, self._context.limits
            self._publishing = loop.after(limits.publish_seconds, self._publish, self._fail)

    def _announce_changes(self) -> None:
        """At once, but not again within settle_seconds: a guest may change its mind without end."""
        self._settling = None
        began, self._agent_began = self._agent_began, False
        if began and self.forwarder is not None:
            self.forwarder.tell_restart()
        agent, ready = self._announced
        self._announced = now = (self.record.agent, self.ready)
        if now == (agent, ready) and not began:
            return
        if self.record.agent and not agent:
            self._announce(self, "agent")
        if self.ready and not ready:
            self._context.journal.log(INFO, self.name, "ready")
            self._announce(self, "ready")
            self._tell_clients()
        elif (agent and not self.record.agent) or (ready and not self.ready):
            # It shuts down or reboots: a connection to it would be lost, and can wedge a hybrid device.
            self._context.journal.log(INFO, self.name, "not ready any more")
            self._announce(self, "down")
            if self.forwarder is not None:
                self.forwarder.on_change()
        loop, limits = self._context.loop, self._context.limits
        self._settling = loop.after(limits.settle_seconds, self._announce_changes, self._fail)

    def close(self, code: str, message: str) -> None:
        """Close the listeners and refuse everyone who waits."""
        for timer in (self._publishing, self._settling):
            if timer is not None:
                timer.cancel()
        self.close_listeners()
        for client in tuple(self.clients):
            client.refuse(code, message)

    def close_listeners(self) -> None:
        listeners, self.listeners = self.listeners, []
        for listener in listeners:
            listener.close()

    def _publish(self) -> None:
        self._publishing = None
        if self.record.status == self._published:
            return
        self._published = self.record.status
        self._announce(self, "status")
        self._tell_clients()

    def _tell_clients(self) -> None:
        for client in tuple(self.clients):
            client.on_change()

    def _fail(self, error: Exception) -> None:
        self._context.journal.log(ERROR, self.name, f"publishing the status failed: {error!r}")
