"""What callers ask for, checked: option dictionaries, and the one request with structure, RunRequest.

Called by the service after the authorisation, on arguments whose D-Bus types GDBus has checked. Pure.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmsilod.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RUN_BYTES_MAX = 512 * 1024
COMMAND_TEXT_MAX = 200
STOP_SECONDS_MAX = 3600
SIZE_MAX = 0xFFFF

START_OPTIONS: dict[str, type] = {"wait": bool}
STOP_OPTIONS: dict[str, type] = {"timeout": int}
RUN_OPTIONS: dict[str, type] = {
    "root": bool,
    "detach": bool,
    "cwd": str,
    "env": dict,
    "rows": int,
    "cols": int,
    "no-start": bool,
}


DISPOSABLE_OPTIONS: dict[str, type] = {"name": str, "network": bool}
HERE_OPTIONS: dict[str, type] = {"network": bool, "path": str, "ro": bool, "home": bool}

SSH_OPTIONS: dict[str, type] = {"root": bool, "no-start": bool}


@dataclass(frozen=True)
class SshRequest:
    """One login by ssh; `uid` is the caller's, as the bus says."""

    name: str
    uid: int
    root: bool = False
    start: bool = True


@dataclass(frozen=True)
class Shared:
    """A directory of the caller's as an open descriptor, and where it is to be in the guest; `home`: even if
    it is all of his home directory.
    """

    fd: int
    path: str
    readonly: bool = False
    home: bool = False


@dataclass(frozen=True)
class DisposableRequest:
    """A disposable for the bus connection `sender` of user `uid`. `template` "" is the default one, `name`
    "" one that is made up; `network` False leaves out all interfaces.
    """

    template: str
    uid: int
    sender: str
    name: str = ""
    network: bool = True
    shared: Shared | None = None


@dataclass(frozen=True)
class Terminal:
    rows: int
    cols: int


@dataclass(frozen=True)
class RunRequest:
    """One command for a guest. `uid` is the caller's, as the bus says.

    `start` allows starting the VM for it.
    """

    name: str
    uid: int
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    cwd: str | None = None
    terminal: Terminal | None = None
    root: bool = False
    detach: bool = False
    start: bool = True


def parse_options(options: Mapping[str, Any], known: Mapping[str, type]) -> dict[str, Any]:
    """The options, if each is known and of its type; else BadRequest with all that is wrong."""
    wrong = [f"unknown option {key[:64]!r}" for key in options if key not in known]
    wrong += [
        f"option {key!r} is not of type {known[key].__name__}"
        for key, value in options.items()
        if key in known and type(value) is not known[key]
    ]
    if wrong:
        raise BadRequest("; ".join(wrong[:8]), f"options are: {', '.join(known) or 'none'}")
    return dict(options)


def parse_stop_timeout(options: Mapping[str, Any]) -> int | None:
    """Seconds until a stopping VM is killed, None for the default."""
    seconds = parse_options(options, STOP_OPTIONS).get("timeout")
    if seconds is None:
        return None
    return _bounded("timeout", seconds, STOP_SECONDS_MAX)


def parse_run(name: str, uid: int, argv: Sequence[str], options: Mapping[str, Any]) -> RunRequest:
    given = parse_options(options, RUN_OPTIONS)
    env = _parse_env(given.get("env", {}))
    if not argv or not argv[0]:
        raise BadRequest("the command is empty")
    cwd = given.get("cwd")
    texts = [*argv, *(text for pair in env for text in pair), *([cwd] if cwd is not None else [])]
    if any("\0" in text for text in texts):
        raise BadRequest("an argument contains a NUL byte")
    if sum(len(text.encode()) + 1 for text in texts) > RUN_BYTES_MAX:
        raise BadRequest(f"command and environment are larger than {RUN_BYTES_MAX // 1024} KiB")
    return RunRequest(
        name=name,
        uid=uid,
        argv=tuple(argv),
        env=env,
        cwd=cwd,
        terminal=_parse_terminal(given),
        root=given.get("root", False),
        detach=given.get("detach", False),
        start=not given.get("no-start", False),
    )


def parse_ssh(name: str, uid: int, options: Mapping[str, Any]) -> SshRequest:
    given = parse_options(options, SSH_OPTIONS)
    return SshRequest(name, uid, root=given.get("root", False), start=not given.get("no-start", False))


def parse_disposable(template: str, uid: int, sender: str, options: Mapping[str, Any]) -> DisposableRequest:
    given = parse_options(options, DISPOSABLE_OPTIONS)
    return DisposableRequest(
        template, uid, sender, name=given.get("name", ""), network=given.get("network", True)
    )


def parse_here(
    template: str, uid: int, sender: str, fd: int, options: Mapping[str, Any]
) -> DisposableRequest:
    """`fd` stays the caller's. Without a network unless the options say so."""
    given = parse_options(options, HERE_OPTIONS)
    if "path" not in given:
        raise BadRequest("option 'path' is missing")
    return DisposableRequest(
        template,
        uid,
        sender,
        network=given.get("network", False),
        shared=Shared(fd, given["path"], readonly=given.get("ro", False), home=given.get("home", False)),
    )


def describe_command(argv: Sequence[str]) -> str:
    """The command on one short printable line, for the question to a person and for polkit's rules."""
    text = ""
    for arg in argv:
        shown = "".join(char if char.isprintable() else "?" for char in arg[:COMMAND_TEXT_MAX])
        text += (" " if text else "") + shlex.quote(shown)
        if len(text) > COMMAND_TEXT_MAX:
            return text[: COMMAND_TEXT_MAX - 1] + "…"
    return text


def _parse_env(env: Mapping[Any, Any]) -> tuple[tuple[str, str], ...]:
    for key, value in env.items():
        if type(key) is not str or type(value) is not str:
            raise BadRequest("option 'env' is not of type a{ss}")
        if not key or "=" in key:
            raise BadRequest(f"{key[:64]!r} is not the name of an environment variable")
    return tuple(env.items())


def _parse_terminal(given: Mapping[str, Any]) -> Terminal | None:
    if ("rows" in given) != ("cols" in given):
        raise BadRequest("only one of the options 'rows' and 'cols' is there")
    if "rows" not in given:
        return None
    return Terminal(_bounded("rows", given["rows"], SIZE_MAX), _bounded("cols", given["cols"], SIZE_MAX))


def _bounded(key: str, value: int, maximum: int) -> int:
    if not 0 <= value <= maximum:
        raise BadRequest(f"option {key!r} is not between 0 and {maximum}")
    return value
