"""The epoll loop: descriptors, timers, and nothing that knows what they are for.

Owned by `main`; everything else is called from it.  Not `selectors`, because that has neither EPOLLPRI (how
a cgroup says that it became empty) nor EPOLLRDHUP (how a peer that is not being read says that it left).
"""

import heapq
import itertools
import select
import sys
import time
from collections.abc import Callable

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
PRIORITY = select.EPOLLPRI
GONE = select.EPOLLRDHUP

Callback = Callable[[int], None]


def log(text: str) -> None:
    """One line on standard error, which is the journal; control characters cannot forge another."""
    line = "".join(char if char.isprintable() else "?" for char in text[:1000])
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except OSError:
        pass  # nobody listens; ignoring


class Timer:
    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Level-triggered.  A descriptor is watched once, and must be forgotten before it is closed."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watches: dict[int, tuple[int, Callback]] = {}
        self._fresh: set[int] = set()
        self._timers: list[tuple[float, int, Timer]] = []
        self._serial = itertools.count()
        self._stopped = False

    def watch(self, fd: int, events: int, callback: Callback) -> None:
        """Starts, changes or (events 0) ends a watch.  A hang-up is reported with any events but 0."""
        known = self._watches.get(fd)
        if not events:
            self.forget(fd)
        elif known is None:
            self._epoll.register(fd, events)
            self._watches[fd] = (events, callback)
            self._fresh.add(fd)
        elif known != (events, callback):
            if known[0] != events:
                self._epoll.modify(fd, events)
            self._watches[fd] = (events, callback)

    def forget(self, fd: int) -> None:
        if self._watches.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._serial), timer))
        return timer

    def stop(self) -> None:
        self._stopped = True

    def run(self) -> None:
        while not self._stopped:
            self._run_timers()
            events = self._epoll.poll(self._timeout())
            # A descriptor closed and opened again within this batch must not get the old one's event.
            self._fresh.clear()
            for fd, mask in events:
                watch = self._watches.get(fd)
                if watch is not None and fd not in self._fresh:
                    try:
                        watch[1](mask)
                    except (
                        Exception
                    ) as exc:  # the outermost edge: one broken watch must not end all commands
                        log(f"error in a watch, dropping it: {type(exc).__name__}: {exc}")
                        self.forget(fd)

    def _timeout(self) -> float:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return -1
        return max(0.0, self._timers[0][0] - time.monotonic())

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                try:
                    callback()
                except Exception as exc:  # as in run()
                    log(f"error in a timer, ignoring: {type(exc).__name__}: {exc}")
