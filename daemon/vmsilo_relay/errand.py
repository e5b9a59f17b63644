"""What vmsilod asks relayd to do with one guest: connect for a D-Bus caller, or ask for power-off.

An Errand belongs to the Controller that started it and is listed with its VM, so that a removal ends it. Its
outcome is reported once.
"""

from __future__ import annotations

from vmsilo_wire import AGENT_PORT, ERROR, POWEROFF, encode_frame

from vmsilo_relay import journal
from vmsilo_relay.dial import Dial
from vmsilo_relay.loop import READ
from vmsilo_relay.packet import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmsilo_relay.context import Context
    from vmsilo_relay.loop import Timer
    from vmsilo_relay.vm import Vm

    Report = Callable[["Errand", Refusal | None, socket.socket | None], None]

POWEROFF_FRAME = encode_frame(POWEROFF)


class Errand:
    """Connects and writes `frames`; `report(errand, refusal, socket)` is called once, unless cancelled.

    With `waits` the errand ends when the agent closes or says something, and no socket is reported.
    """

    def __init__(
        self, context: Context, vm: Vm, frames: bytes, report: Report, *, port: int = AGENT_PORT
    ) -> None:
        self._context = context
        self._vm = vm
        self._report: Report | None = report
        self._port = port
        self._dial = Dial(context, vm.record.channel, frames, self._on_dialled, port=port)
        self._agent: socket.socket | None = None
        self._timer: Timer | None = None
        self.waits = False

    def start(self) -> None:
        self._vm.clients.add(self)
        limits = self._context.limits
        if self._port != AGENT_PORT:
            self._dial.start(limits.port_dial_seconds)
        else:
            self._dial.start(limits.poweroff_dial_seconds if self.waits else None)

    def on_change(self) -> None:
        """An errand does not wait for readiness: vmsilod knows when to ask."""

    def refuse(self, code: str, message: str, hint: str = "") -> None:
        self._finish(Refusal(code, message, hint), None)

    def cancel(self) -> None:
        self._report = None
        self._finish(None, None)

    def _on_dialled(self, agent: socket.socket | None, reason: str) -> None:
        if agent is None:
            what = "the agent" if self._port == AGENT_PORT else f"vsock port {self._port}"
            self.refuse("agent-unreachable", f"{what} of {self._vm.name} can't be reached: {reason}")
        elif not self.waits:
            self._finish(None, agent)
        else:
            agent.settimeout(0)
            self._agent = agent
            loop = self._context.loop
            self._timer = loop.after(self._context.limits.poweroff_seconds, self._expire, self._fail)
            loop.watch(agent.fileno(), READ, self._on_agent, self._fail)

    def _on_agent(self, _events: int) -> None:
        assert self._agent is not None
        try:
            untrusted_byte = self._agent.recv(1)  # the first frame's type
        except BlockingIOError:
            return
        except OSError:
            untrusted_byte = b""  # the guest went down with the connection open
        if untrusted_byte == bytes((ERROR,)):
            self.refuse("failed", f"the agent of {self._vm.name} refused")
        else:
            self._finish(None, None)

    def _expire(self) -> None:
        self.refuse("timeout", f"the agent of {self._vm.name} did not answer")

    def _fail(self, error: Exception) -> None:
        self._context.journal.log(journal.ERROR, self._vm.name, f"an errand failed: {error!r}")
        self.refuse("failed", "internal error")

    def _finish(self, refusal: Refusal | None, agent: socket.socket | None) -> None:
        self._vm.clients.discard(self)
        self._dial.cancel()
        if self._timer is not None:
            self._timer.cancel()
        waited, self._agent = self._agent, None
        if waited is not None:
            self._context.loop.forget(waited.fileno())
            waited.close()
        report, self._report = self._report, None
        if report is not None:
            report(self, refusal, agent)
        elif agent is not None:
            agent.close()
