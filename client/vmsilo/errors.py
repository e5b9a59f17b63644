"""Errors that a person reads: a fact, and apart from it a hint what to do.

Raised everywhere in the client, shown once by `programs.launch`. Text that came from a guest or a daemon
goes through `printable` before it gets into one.
"""

import os

FACT_MAX = 600


class ClientError(Exception):
    """`status` is the exit status; None takes the program's own for "failed"."""

    def __init__(self, fact: str, hint: str = "", status: int | None = None) -> None:
        super().__init__(fact)
        self.fact = fact
        self.hint = hint
        self.status = status


class UsageError(ClientError):
    """The command line is wrong."""


class LostError(ClientError):
    """The command had been started, and its connection ended: only the daemon knows why."""


class SocketClosedError(ClientError):
    """The command socket is absent, refuses, or closed before it answered: only the daemon knows why."""


class StoppedMeanwhileError(SocketClosedError):
    """Somebody stopped the VM, or it ended, while its boot was waited for: not to be started once more."""


def printable(untrusted_text: object, limit: int = FACT_MAX) -> str:
    """One line without control, formatting or surrogate characters, at most `limit` characters long."""
    text = str(untrusted_text)[: limit + 1]
    shown = "".join(c if c.isprintable() else ("�" if c > "~" else " ") for c in text).strip()
    return shown[:limit] + "..." if len(shown) > limit else shown


def split_message(untrusted_message: str) -> tuple[str, str]:
    """Of a daemon's error: the first line is the fact, the rest the hint, with or without `hint:`."""
    fact, _, rest = untrusted_message.partition("\n")
    return printable(fact), printable(rest.removeprefix("hint:"))


def write_stderr(text: str) -> None:
    data = text.encode("utf-8", "replace")
    try:
        os.write(2, data)
    except OSError:
        return  # nobody is left to tell


def report(program: str, error: ClientError) -> None:
    text = f"{program}: {error.fact}\n"
    if error.hint:
        text += f"hint: {error.hint}\n"
    write_stderr(text)
