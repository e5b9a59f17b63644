"""What every part of consoled needs: the loop, the journal and the limits. Built once by `main`."""

from __future__ import annotations

import vmsilo_relay.context


class Limits(vmsilo_relay.context.Limits):
    """The bounds that only consoled has; of the relay's, those of accepting and of control connections."""

    vms = 1024  # four descriptors each in systemd's store
    clients_per_vm = 16
    request_seconds = 10.0  # a client's first packet after it connected
    answer_seconds = 10.0  # without progress, for a client's taking of what is left after the end
    probe_seconds = 1.0  # how soon it is seen that a writer left whose input the guest does not take
    log_burst = 2000  # lines of one VM that the journal takes at once
    log_rate = 20.0  # and lines per second from then on
    animation_seconds = 10.0  # at most one line of systemd's animation per VM in this time
    notice_seconds = 5.0  # at most one word about dropped lines per VM in this time


class Context(vmsilo_relay.context.Context):
    __slots__ = ()
    limits: Limits
