"""The one loop of relayd: descriptors and timers.

Built once by `vmsilo_relay.__main__.main`; everything else registers callbacks here. It never closes a
descriptor: who watches one owns it, and forgets it here before closing it. Lives as long as the process.
"""

from __future__ import annotations

import heapq
import selectors
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    OnEvents = Callable[[int], None]
    OnError = Callable[[Exception], None]

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE
COMPACT_FROM = 256


class Timer:
    """One pending call; `cancel` may be called at any time and more than once."""

    __slots__ = ("_loop", "call", "fail")

    def __init__(self, loop: Loop, call: Callable[[], None], fail: OnError) -> None:
        self._loop: Loop | None = loop
        self.call: Callable[[], None] | None = call
        self.fail: OnError | None = fail

    def cancel(self) -> None:
        loop, self._loop = self._loop, None
        self.call = self.fail = None
        if loop is not None:
            loop.note_cancelled()


class Watch:
    """What to call for one descriptor; its identity tells a stale event from one of a reused number."""

    __slots__ = ("call", "events", "fail")

    def __init__(self, events: int, call: OnEvents, fail: OnError) -> None:
        self.events = events
        self.call = call
        self.fail = fail


class Loop:
    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._watches: dict[int, Watch] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._serial = 0
        self._cancelled = 0

    def watch(self, fd: int, events: int, call: OnEvents, fail: OnError) -> None:
        """Call `call(events)` whenever `fd` is ready; an exception of it goes to `fail`."""
        watch = Watch(events, call, fail)
        if fd in self._watches:
            self._selector.modify(fd, events, watch)
        else:
            self._selector.register(fd, events, watch)
        self._watches[fd] = watch

    def forget(self, fd: int) -> None:
        """Stop watching `fd`; nothing happens if it is not watched."""
        if self._watches.pop(fd, None) is not None:
            self._selector.unregister(fd)

    def after(self, seconds: float, call: Callable[[], None], fail: OnError) -> Timer:
        timer = Timer(self, call, fail)
        self._serial += 1
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._serial, timer))
        return timer

    def note_cancelled(self) -> None:
        self._cancelled += 1
        if self._cancelled > COMPACT_FROM and self._cancelled * 2 > len(self._timers):
            self._timers = [entry for entry in self._timers if entry[2].call is not None]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def run(self) -> None:
        while True:
            self.step()

    def step(self) -> None:
        """Wait for the next event or timer, and deliver what is due."""
        for key, events in self._selector.select(self._pause()):
            watch: Watch = key.data
            if self._watches.get(key.fd) is not watch:
                continue  # an earlier callback of this round changed or closed it
            try:
                watch.call(events)
            except Exception as error:
                watch.fail(error)
        self._run_timers()

    def _pause(self) -> float | None:
        while self._timers and self._timers[0][2].call is None:
            heapq.heappop(self._timers)
            self._cancelled = max(0, self._cancelled - 1)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            call, fail = timer.call, timer.fail
            if call is None or fail is None:
                self._cancelled = max(0, self._cancelled - 1)
                continue
            timer.call = timer.fail = timer._loop = None
            try:
                call()
            except Exception as error:
                fail(error)
