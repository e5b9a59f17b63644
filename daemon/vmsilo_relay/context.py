"""What every part of relayd needs: the loop, the journal and the limits. Built once by `main`."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsilo_relay.journal import Journal
    from vmsilo_relay.loop import Loop


class Limits:
    """Every bound of relayd; seconds where a time is meant. Tests shorten some with --limit."""

    request_seconds = 10.0  # a client's request after it connected
    answer_seconds = 10.0  # a client's taking of the last packet
    dial_seconds = 10.0  # from the first connect to the agent until HELLO is written
    poweroff_seconds = 5.0  # the agent's answer to POWEROFF
    poweroff_dial_seconds = 2.0  # an agent that is gone must not cost the guest the time for its shutdown
    port_dial_seconds = 5.0  # another port than the agent's: its guest is up, so it listens or it never will
    message_seconds = 2.0  # a guest's message after it connected
    publish_seconds = 0.5  # at most one status change per VM in this time
    settle_seconds = 0.02  # at most one change between ready and not ready per VM in this time
    pause_seconds = 0.2  # a listener rests when descriptors ran out
    forward_pause_seconds = 0.02  # a forwarder's link rests this long after each portion of requests
    clients_per_vm = 512
    accepts_per_wakeup = 64
    messages_per_vm = 16
    messages_total = 128
    controllers = 64
    controller_queue = 1024  # packets for a controller that does not read

    def override(self, assignment: str) -> None:
        """Apply one KEY=NUMBER; raises ValueError."""
        key, _, value = assignment.partition("=")
        default = getattr(type(self), key, None)
        if not isinstance(default, int | float):
            raise ValueError(f"no limit {key!r}")
        setattr(self, key, type(default)(value))


class Context:
    __slots__ = ("journal", "limits", "loop")

    def __init__(self, loop: Loop, journal: Journal, limits: Limits) -> None:
        self.loop = loop
        self.journal = journal
        self.limits = limits
