"""The errors of vmsilod: one class per machine code, and the one table from class to D-Bus name and level.

Raised everywhere in the daemon, turned into a reply by the bus and by the control socket. Four kinds: a fact
shown to the user, a broken request, a denial, and a bug (any other exception), whose text no caller sees. It
never logs. Lives as long as the process.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar


class Kind(Enum):
    """What an error means, with the level that it is logged at."""

    SHOWN = logging.INFO
    BROKEN_REQUEST = logging.DEBUG
    DENIED = logging.INFO
    BUG = logging.ERROR


class VmsiloError(Exception):
    """`code` is for machines (kebab case), `message` states the fact, `hint` says what to do about it."""

    default_code: ClassVar[str] = "failed"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = self.default_code
        self.message = message
        self.hint = hint

    @property
    def text(self) -> str:
        """Fact and hint as one text, the hint on a line of its own."""
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    @staticmethod
    def from_code(code: str, message: str, hint: str = "") -> VmsiloError:
        """The error that a peer's code names; an unknown code is kept on a `Failed`."""
        error = _BY_CODE.get(code, Failed)(message, hint)
        error.code = code
        return error


class NoSuchVm(VmsiloError):
    default_code = "no-such-vm"


class BadRequest(VmsiloError):
    default_code = "bad-request"


class Denied(VmsiloError):
    """Not allowed, or not known to be allowed: whatever goes wrong while asking is a denial too."""

    default_code = "denied"


class Busy(VmsiloError):
    default_code = "busy"


class StartFailed(VmsiloError):
    default_code = "start-failed"


class Timeout(VmsiloError):
    default_code = "timeout"


class NotRunning(VmsiloError):
    default_code = "not-running"


class ConfigBroken(VmsiloError):
    default_code = "config-broken"


class NoSsh(VmsiloError):
    """The VM runs, but cannot be logged in to by ssh."""

    default_code = "no-ssh"


class Failed(VmsiloError):
    """What should have worked did not. Its text is written for the user, never copied from an exception."""

    default_code = "failed"


@dataclass(frozen=True)
class Wire:
    """How one code looks outside."""

    dbus_name: str
    kind: Kind


_PREFIX = "org.vmsilo1.Error."
WIRE = {
    NoSuchVm: Wire(_PREFIX + "NoSuchVm", Kind.SHOWN),
    BadRequest: Wire(_PREFIX + "BadRequest", Kind.BROKEN_REQUEST),
    Denied: Wire(_PREFIX + "Denied", Kind.DENIED),
    Busy: Wire(_PREFIX + "Busy", Kind.SHOWN),
    StartFailed: Wire(_PREFIX + "StartFailed", Kind.SHOWN),
    Timeout: Wire(_PREFIX + "Timeout", Kind.SHOWN),
    NotRunning: Wire(_PREFIX + "NotRunning", Kind.SHOWN),
    ConfigBroken: Wire(_PREFIX + "ConfigBroken", Kind.SHOWN),
    NoSsh: Wire(_PREFIX + "NoSsh", Kind.SHOWN),
    Failed: Wire(_PREFIX + "Failed", Kind.BUG),
}
_BY_CODE: dict[str, type[VmsiloError]] = {kind.default_code: kind for kind in WIRE}


def wire_of(error: VmsiloError) -> Wire:
    """The table's entry for the nearest class of this error."""
    for kind in type(error).__mro__:
        if kind in WIRE:
            return WIRE[kind]
    return WIRE[Failed]


def shown_error(error: BaseException) -> VmsiloError:
    """What may be told to a caller: ours as it is, anything else as an internal error without its text."""
    if isinstance(error, VmsiloError):
        return error
    return Failed("internal error", "see the journal of vmsilod")
