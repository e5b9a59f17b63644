"""Asks polkit whether a caller may do a thing, without ever holding up another call.

Called by export.py before each handler. The subject is the caller's bus name, never a PID. An authority
that is absent, slow or broken is a denial, for root too (root has systemctl). Lives as long as the bus
connection.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gi.repository import Gio, GLib

from vmsilod import loop
from vmsilod.errors import Denied

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

NAME = "org.freedesktop.PolicyKit1"
PATH = "/org/freedesktop/PolicyKit1/Authority"
INTERFACE = "org.freedesktop.PolicyKit1.Authority"
_FLAG_ALLOW_INTERACTION = 1


@dataclass(frozen=True)
class Question:
    """May `sender` (a unique bus name, of user `uid`) do `action`? `interactive`: a person may be asked."""

    sender: str
    uid: int
    action: str
    details: Mapping[str, str]
    interactive: bool = False


class Authority(Protocol):
    """Whoever decides. `check` returns for yes and raises Denied for no and for "don't know"."""

    async def check(self, question: Question) -> None: ...


@dataclass(frozen=True)
class Limits:
    """The bus allows 128 unanswered calls of our connection (max_replies_per_connection), and hanging
    questions use them up for all: quiet and interactive ones together stay below that, and no user can
    hold more than a few.
    """

    quiet_seconds: float = 20
    quiet_per_uid: int = 8
    quiet_total: int = 48
    interactive_seconds: float = 120
    interactive_per_uid: int = 2
    interactive_total: int = 64


class Turns:
    """At most `each` turns per user and `total` in all at a time; whoever is beyond that waits in order."""

    def __init__(self, each: int, total: int) -> None:
        self._each = each
        self._total = total
        self._taken: Counter[int] = Counter()
        self._waiting: dict[int, deque[Future[None]]] = {}

    def has_room(self, uid: int) -> bool:
        return self._taken[uid] < self._each and self._taken.total() < self._total

    @asynccontextmanager
    async def turn(self, uid: int, seconds: float) -> AsyncIterator[None]:
        """One turn, or TimeoutError if none comes in time."""
        if self.has_room(uid) and uid not in self._waiting:
            self._taken[uid] += 1
        else:
            mine: Future[None] = Future()
            self._waiting.setdefault(uid, deque()).append(mine)
            try:
                await loop.with_deadline(mine, seconds)
            except TimeoutError:
                mine.cancel()
                raise
        try:
            yield
        finally:
            self._taken[uid] -= 1
            if not self._taken[uid]:
                del self._taken[uid]
            self._grant()

    def _grant(self) -> None:
        for uid, queue in list(self._waiting.items()):
            while queue and (queue[0].cancelled() or self.has_room(uid)):
                mine = queue.popleft()
                if mine.set_running_or_notify_cancel():
                    self._taken[uid] += 1
                    mine.set_result(None)
            if not queue:
                del self._waiting[uid]


class Polkit:
    """The system's polkit authority on one bus connection."""

    def __init__(self, con: Gio.DBusConnection, limits: Limits | None = None) -> None:
        self._con = con
        self._limits = limits or Limits()
        self._quiet = Turns(self._limits.quiet_per_uid, self._limits.quiet_total)
        self._interactive = Turns(self._limits.interactive_per_uid, self._limits.interactive_total)
        self._ids = itertools.count(1)

    async def check(self, question: Question) -> None:
        """Asked quietly first, so that calls which need no password are never held back by open prompts."""
        authorized, challenge = await self._ask_quietly(question)
        if not authorized and challenge and question.interactive:
            authorized = await self._ask_person(question)
        if not authorized:
            hint = "an administrator may allow it, interactively" if challenge else ""
            raise Denied(f"{question.action} is not allowed to uid {question.uid}", hint)

    async def _ask_quietly(self, question: Question) -> tuple[bool, bool]:
        seconds = self._limits.quiet_seconds
        deadline = GLib.get_monotonic_time() + seconds * 1e6
        try:
            async with self._quiet.turn(question.uid, seconds):
                left = (deadline - GLib.get_monotonic_time()) / 1e6
                return await self._ask(question, 0, left)
        except TimeoutError as error:
            raise Denied("polkit is busy with other questions", "try again") from error

    async def _ask_person(self, question: Question) -> bool:
        if not self._interactive.has_room(question.uid):
            raise Denied("too many questions for a password are open", "answer or dismiss them first")
        async with self._interactive.turn(question.uid, self._limits.interactive_seconds):
            authorized, _ = await self._ask(
                question, _FLAG_ALLOW_INTERACTION, self._limits.interactive_seconds
            )
        return authorized

    async def _ask(self, question: Question, flags: int, seconds: float) -> tuple[bool, bool]:
        """(is authorized, could be after a password)."""
        cancellation = f"vmsilo-{next(self._ids)}"
        subject = ("system-bus-name", {"name": GLib.Variant("s", question.sender)})
        args = GLib.Variant(
            "((sa{sv})sa{ss}us)", (subject, question.action, dict(question.details), flags, cancellation)
        )
        timeout_ms = max(1, int(seconds * 1000))
        try:
            ((authorized, challenge, _details),), _ = await loop.dbus_call(
                self._con, NAME, PATH, INTERFACE, "CheckAuthorization", args, "((bba{ss}))", timeout_ms
            )
        except GLib.Error as error:
            if error.matches(Gio.io_error_quark(), Gio.IOErrorEnum.TIMED_OUT):
                self._cancel(cancellation)
            raise Denied("polkit does not answer", "systemctl status polkit") from error
        return bool(authorized), bool(challenge)

    def _cancel(self, cancellation: str) -> None:
        """Takes a question back, which also closes its prompt. No answer is awaited."""
        args = GLib.Variant("(s)", (cancellation,))
        flags = Gio.DBusCallFlags.NO_AUTO_START
        self._con.call(
            NAME, PATH, INTERFACE, "CancelCheckAuthorization", args, None, flags, 1000, None, None, None
        )
