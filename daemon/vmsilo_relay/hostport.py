"""What guests say: one short message per connection to HOST_PORT, in the format of sd_notify(3).

A hybrid VM has a listener of its own, kernel-vsock VMs share the kernel's. Who speaks follows from the
listener or from the peer's CID, never from the message; Relay and Vm know which. The guest's first process
waits until we close, so we close as soon as it has spoken, and never answer.
"""

from __future__ import annotations

import re

from vmsilo_relay.journal import ERROR, INFO
from vmsilo_relay.loop import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from vmsilo_relay.context import Context
    from vmsilo_relay.loop import Timer
    from vmsilo_relay.vm import Vm

MESSAGE_MAX = 4096
STATUS_MAX = 120
UNPRINTABLE = re.compile(r"[^\x20-\x7e]")
UNIT = re.compile(r"[A-Za-z0-9:_.@\\-]{1,80}", re.ASCII)


class Message:
    """What counts of a guest's message; None is for what it does not speak of."""

    __slots__ = ("agent", "ready", "status")

    def __init__(self, *, agent: bool | None, ready: bool | None, status: str | None) -> None:
        self.agent = agent
        self.ready = ready
        self.status = status


def parse_message(untrusted_data: bytes) -> Message:
    """Read READY, STATUS, X_VMSILO_AGENT and systemd's X_SYSTEMD_*; everything else is passed over."""
    untrusted_fields: dict[str, str] = {}
    for untrusted_line in untrusted_data.decode("utf-8", "replace").split("\n"):
        key, equals, untrusted_value = untrusted_line.partition("=")
        if equals:
            untrusted_fields[key] = untrusted_value
    status = untrusted_fields.get("STATUS")
    if status is not None:
        status = UNPRINTABLE.sub("?", status[:STATUS_MAX])
    elif UNIT.fullmatch(untrusted_fields.get("X_SYSTEMD_UNIT_ACTIVE", "")):
        status = f"reached {untrusted_fields['X_SYSTEMD_UNIT_ACTIVE']}"
    elif UNIT.fullmatch(untrusted_fields.get("X_SYSTEMD_SHUTDOWN", "")):
        status = f"shutting down ({untrusted_fields['X_SYSTEMD_SHUTDOWN']})"
    agent = {"1": True, "0": False}.get(untrusted_fields.get("X_VMSILO_AGENT", ""))
    ready = True if untrusted_fields.get("READY") == "1" else None
    if "X_SYSTEMD_SHUTDOWN" in untrusted_fields:  # also before a reboot, which says READY=1 again
        agent = ready = False
    return Message(agent=agent, ready=ready, status=status)


class OpenMessages:
    """All open guest connections: a guest that floods loses its own oldest, and not another guest's."""

    def __init__(self, context: Context) -> None:
        self._limits = context.limits
        self._open: dict[str, list[Speaker]] = {}
        self._total = 0

    def add(self, speaker: Speaker) -> None:
        mine = self._open.setdefault(speaker.vm.name, [])
        if len(mine) >= self._limits.messages_per_vm:
            mine[0].close()
        elif self._total >= self._limits.messages_total:
            max(self._open.values(), key=len)[0].close()
        self._open.setdefault(speaker.vm.name, []).append(speaker)
        self._total += 1

    def discard(self, speaker: Speaker) -> None:
        mine = self._open.get(speaker.vm.name, [])
        if speaker in mine:
            mine.remove(speaker)
            self._total -= 1
        if not mine:
            self._open.pop(speaker.vm.name, None)

    def close_of(self, vm: Vm) -> None:
        for speaker in tuple(self._open.get(vm.name, ())):
            speaker.close()


class Speaker:
    """One guest connection, from accept until it has spoken or its time is over."""

    def __init__(self, context: Context, vm: Vm, sock: socket.socket, speakers: OpenMessages) -> None:
        self._context = context
        self.vm = vm
        self._sock = sock
        self._speakers = speakers
        self._timer: Timer | None = None

    def start(self) -> None:
        self._speakers.add(self)
        loop = self._context.loop
        self._timer = loop.after(self._context.limits.message_seconds, self.close, self._fail)
        loop.watch(self._sock.fileno(), READ, self._on_event, self._fail)
        self._on_event(READ)  # an exception ends in close and at the listener's edge

    def close(self) -> None:
        if self._timer is None:
            return
        self._timer.cancel()
        self._timer = None
        self._speakers.discard(self)
        self._context.loop.forget(self._sock.fileno())
        self._sock.close()

    def _on_event(self, _events: int) -> None:
        try:
            untrusted_data = self._sock.recv(MESSAGE_MAX + 1)
        except BlockingIOError:
            return
        except OSError:
            untrusted_data = b""  # reset; the same as closed
        try:
            if len(untrusted_data) > MESSAGE_MAX:
                self._context.journal.log(INFO, self.vm.name, "guest message too long, ignoring it")
            elif untrusted_data:
                self.vm.hear(parse_message(untrusted_data))
        finally:
            self.close()  # only now: what the guest was told to be heard is also on disk

    def _fail(self, error: Exception) -> None:
        self._context.journal.log(ERROR, self.vm.name, f"hearing the guest failed: {error!r}")
        self.close()
