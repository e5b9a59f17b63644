"""What every part of the forwarder needs: the loop, the journal and the limits. Built once by `main`."""

from __future__ import annotations

import vmsilo_relay.context


class Limits(vmsilo_relay.context.Limits):
    """The bounds that only the forwarder has; of the relay's, those of accepting."""

    ready_seconds = 60.0  # for a host's connection, while the guest boots
    open_seconds = 15.0  # from the question for a connection to the guest until CONNECTED
    host_seconds = 10.0  # a service of the host must take a connection in this time
    ask_seconds = 20.0  # vmsilod's answer
    ask_again_seconds = 1.0
    park_first_seconds = 0.2  # until a parked connection that broke is opened again, doubled each time
    park_most_seconds = 15.0
    parked = 2  # connections that wait in the guest, per port
    connections_per_port = 100
    connections = 250  # with 128 that may be parked below what the guest's agent takes


class Context(vmsilo_relay.context.Context):
    __slots__ = ()
    limits: Limits
