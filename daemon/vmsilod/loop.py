"""Coroutines on the GLib main loop: a driver for `async def`, timers, worker pools, D-Bus calls, watches.

Used by every part of vmsilod. There is no asyncio: the PyGObject of Debian 12 has no gi.events. All code but
the functions given to workers runs on the thread of the main loop. A callback that raises is logged and
stays installed, because GLib drops the source of a callback that raised and the listener would be dead
without a word. It never blocks. Lives as long as the process.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gi.repository import Gio, GLib

from vmsilod.errors import VmsiloError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Sequence

log = logging.getLogger(__name__)

T = TypeVar("T")
Result = TypeVar("Result")

WORKERS = 4
PATIENT = 16
_pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="vmsilod-worker")  # a thread is made when needed
_patient = ThreadPoolExecutor(PATIENT, thread_name_prefix="vmsilod-patient")


def spawn(coro: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine on the main loop; from any thread. A failure that nobody asks for is logged once."""
    task = _Task(coro)
    call_soon(task.step)
    return task.outcome


async def wait_for(future: Future[T]) -> T:
    """The result of a future, once it is there; the coroutine goes on on the main loop."""
    return await _Pending(future)


async def in_worker(function: Callable[..., T], *args: Any) -> T:
    """function(*args) on the worker pool: for what may take over 5 ms and touches no state."""
    return await wait_for(_pool.submit(function, *args))


async def in_patient_worker(function: Callable[..., T], *args: Any) -> T:
    """As in_worker, for what opens a path that the configuration names: its file system may be a server's
    that is gone, and must hold up nobody but those who want it. Images are read whole there, too.
    """
    return await wait_for(_patient.submit(function, *args))


async def after(seconds: float) -> None:
    timer: Future[None] = Future()
    call_later(seconds, timer.set_result, None)
    await wait_for(timer)


async def insist(action: Callable[[], Coroutine[Any, Any, T]], delays: Sequence[float], what: str) -> T:
    """The result of the first attempt that does not raise VmsiloError; one more after each delay (seconds).
    `what` it is about, for the journal.
    """
    for delay in delays:
        try:
            return await action()
        except VmsiloError as error:
            log.error("%s: %s; once more in %g s", what, error, delay)
        await after(delay)
    return await action()


async def with_deadline(pending: Future[T] | Coroutine[Any, Any, T], seconds: float) -> T:
    """The result of a future or coroutine, or TimeoutError after `seconds`.

    What is late goes on; its result is ignored.
    """
    future = pending if isinstance(pending, Future) else spawn(pending)
    if future.done():
        return future.result()
    first: Future[str] = Future()

    def settle(what: str) -> None:
        if not first.done():
            first.set_result(what)

    timer = call_later(seconds, settle, "timer")
    future.add_done_callback(lambda _: call_soon(settle, "future"))
    if await wait_for(first) == "future":
        GLib.source_remove(timer)
    if future.done():
        return future.result()
    future.add_done_callback(_ignore_late)
    raise TimeoutError(f"no result within {seconds:g} s")


async def dbus_reply(
    con: Gio.DBusConnection,
    name: str,
    path: str,
    iface: str,
    method: str,
    args: GLib.Variant | None,
    reply_type: str | None,
    timeout_ms: int,
    fds: Sequence[int] | None = None,
) -> tuple[GLib.Variant, list[int]]:
    """One method call: (reply, descriptors that the caller now owns). Raises GLib.Error.

    `fds` are duplicated into the message and stay the caller's. The parameters are those of a D-Bus call.
    """
    reply: Future[tuple[GLib.Variant, Gio.UnixFDList | None]] = Future()

    def finish(connection: Gio.DBusConnection, result: Gio.AsyncResult) -> None:
        try:
            reply.set_result(connection.call_with_unix_fd_list_finish(result))
        except GLib.Error as error:
            reply.set_exception(error)

    attached = None
    if fds:
        attached = Gio.UnixFDList.new()
        for fd in fds:
            attached.append(fd)
    con.call_with_unix_fd_list(
        name,
        path,
        iface,
        method,
        args,
        GLib.VariantType.new(reply_type) if reply_type else None,
        Gio.DBusCallFlags.NONE,
        timeout_ms,
        attached,
        None,
        finish,
    )
    values, received = await wait_for(reply)
    return values, list(received.steal_fds()) if received is not None else []


async def dbus_call(*args: Any, **options: Any) -> tuple[tuple[Any, ...], list[int]]:
    """As `dbus_reply`, the reply unpacked: for large ones that takes long."""
    values, fds = await dbus_reply(*args, **options)
    return tuple(values.unpack()), fds


def call_soon(function: Callable[..., object], *args: Any) -> int:
    """Call function(*args) once in the next turn of the loop; from any thread. Returns the GLib source."""
    return int(GLib.idle_add(once(function), *args, priority=GLib.PRIORITY_DEFAULT))


def call_later(seconds: float, function: Callable[..., object], *args: Any) -> int:
    """Call function(*args) once after `seconds`. Returns the GLib source, removable until it has run."""
    return int(GLib.timeout_add(_milliseconds(seconds), once(function), *args))


def watch_fd(fd: int, callback: Callable[[], object]) -> int:
    """Call callback() whenever fd is readable or hung up, until GLib.source_remove of the returned source.

    Remove the source before closing fd.
    """

    def ready(_fd: int, _condition: GLib.IOCondition) -> bool:
        _run(callback)
        return True

    condition = GLib.IOCondition.IN | GLib.IOCondition.HUP | GLib.IOCondition.ERR
    return int(GLib.unix_fd_add_full(GLib.PRIORITY_DEFAULT, fd, condition, ready))


def once(function: Callable[..., object]) -> Callable[..., bool]:
    """A GLib callback that runs function once and logs what it raises."""

    def run(*args: Any) -> bool:
        _run(function, *args)
        return False

    return run


def _run(function: Callable[..., object], *args: Any) -> None:
    try:
        function(*args)
    except Exception:  # the outermost edge: above is only GLib
        log.exception("callback %s failed", getattr(function, "__qualname__", function))


def _milliseconds(seconds: float) -> int:
    return max(0, int(seconds * 1000))


def _ignore_late(future: Future[Any]) -> None:
    if not future.cancelled() and future.exception() is not None:
        log.debug("ignoring a failure after its deadline: %s", future.exception())


class _Pending(Generic[T]):
    """What a coroutine yields to its driver: the future that it waits for."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def __await__(self) -> Generator[Future[T], None, T]:
        if not self._future.done():
            yield self._future
        return self._future.result()


class _Outcome(Future[Result]):
    """The result of a coroutine; remembers whether anyone has looked at it."""

    looked_at = False

    def result(self, timeout: float | None = None) -> Result:
        self.looked_at = True
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.looked_at = True
        return super().exception(timeout)

    def __del__(self) -> None:
        if not self.looked_at and self.done():
            error = super().exception()
            if error is not None:
                log.error("a background task failed", exc_info=error)


class _Task(Generic[T]):
    """One coroutine under way."""

    def __init__(self, coro: Coroutine[Any, Any, T]) -> None:
        self._coro = coro
        self.outcome: Future[T] = _Outcome()
        self.outcome.set_running_or_notify_cancel()  # from here on cancel() has no effect

    def step(self) -> None:
        try:
            awaited = self._coro.send(None)
        except StopIteration as end:
            self.outcome.set_result(end.value)
        except BaseException as error:
            # BaseException: a sys.exit() deep in a handler must not end the daemon. Without this frame in
            # its traceback the error forms no cycle with the outcome, which therefore reports it at once.
            tail = error.__traceback__.tb_next if error.__traceback__ else None
            self.outcome.set_exception(error.with_traceback(tail))
        else:
            awaited.add_done_callback(lambda _: call_soon(self.step))
