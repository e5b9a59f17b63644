"""Two things that a coroutine waits for on the GLib loop: a lock, and a readable descriptor.

Used by the lifecycle and the control socket, on the main loop only. Each belongs to the object that it
guards.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING

from gi.repository import GLib

from vmsilod import loop

if TYPE_CHECKING:
    from types import TracebackType


class Lock:
    """Mutual exclusion between coroutines, first come first served: `async with lock:`."""

    def __init__(self) -> None:
        self._held = False
        self._queue: deque[Future[None]] = deque()

    @property
    def held(self) -> bool:
        return self._held

    async def __aenter__(self) -> None:
        if self._held:
            turn: Future[None] = Future()
            self._queue.append(turn)
            await loop.wait_for(turn)
        self._held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._queue:
            self._queue.popleft().set_result(None)  # stays held: the next owner has it from here on
        else:
            self._held = False


async def readable(fd: int, seconds: float) -> bool:
    """Wait until fd can be read (or is hung up); False when that takes longer than `seconds`."""
    arrived: Future[bool] = Future()

    def settle() -> None:
        if not arrived.done():
            arrived.set_result(True)

    watch = loop.watch_fd(fd, settle)
    try:
        return await loop.with_deadline(arrived, seconds)
    except TimeoutError:
        return False
    finally:
        GLib.source_remove(watch)
