"""Errors of the VMM drivers and their control clients, as kinds of the daemon's own (vmsilod.errors).

Raised by the modules of this package. The edges turn them into replies and log lines like every other error
of the daemon.
"""

from __future__ import annotations

from vmsilod.errors import ConfigBroken, Failed, NotRunning, StartFailed, Timeout


class MissingVmm(StartFailed):
    """The VMM that is asked for is not installed."""


class KvmNeeded(StartFailed):
    """The VMM runs only on KVM, which this host does not offer."""


class LaunchRefused(ConfigBroken):
    """The configuration and the leases do not make a VM that this driver would start."""


class BadOptionValue(LaunchRefused, ValueError):
    """A value holds bytes that could end the option it would stand in."""


class MonitorError(Failed):
    """A control request did not do what it was sent for."""


class MonitorUnreachable(MonitorError, NotRunning):
    """Nobody listens on the control socket."""

    default_code = NotRunning.default_code


class MonitorTimeout(MonitorError, Timeout):
    """The VMM took the request and did not answer in time; whether it acted is unknown."""

    default_code = Timeout.default_code


class MonitorClosed(MonitorError, NotRunning):
    """The VMM closed the connection before it answered: it is gone or going."""

    default_code = NotRunning.default_code


class MonitorRefused(MonitorError):
    """The VMM answered with an error. `reason` is an errno (crosvm), an error class (QEMU) or None."""

    def __init__(self, message: str, hint: str = "", *, reason: int | str | None = None) -> None:
        super().__init__(message, hint)
        self.reason = reason


class MonitorGarbled(MonitorError):
    """The VMM's answer does not follow its protocol."""
