"""Work in another network namespace, by a thread that enters it and ends there.

Called by the switch. A thread that has changed its namespace is never used again: one of the worker
pool's would go on in there with somebody else's work. Programs that it starts, and what it reads below
/proc/sys, are those of the namespace too. The descriptors of namespaces are their caller's.
"""

from __future__ import annotations

import ctypes
import os
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from vmsilod import loop
from vmsilod.errors import Failed

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)  # os.setns is there from Python 3.12 on


async def run_inside(namespace: int, function: Callable[..., T], *args: object) -> T:
    """function(*args) in the network namespace of that descriptor. Raises Failed where it cannot be entered,
    and before anything is done if it is the one that vmsilod itself is in.
    """
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            _enter(namespace)
            outcome.set_result(function(*args))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="vmsilod-namespace", daemon=True).start()
    return await loop.wait_for(outcome)


def open_namespace(pid: int, unit: str) -> int:
    """The network namespace of a process that belongs to that unit. Raises Failed."""
    try:
        fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Failed(f"cannot open the network namespace of {unit}: {error.strerror}") from error
    try:
        # After the open: had the number gone to another process before, it would be seen here.
        with open(f"/proc/{pid}/cgroup", encoding="ascii") as cgroup:  # noqa: PTH123 - as above
            held = f"/{unit}" in cgroup.read()
    except OSError:
        held = False
    if not held:
        os.close(fd)
        raise Failed(f"{unit} ended while its network namespace was opened")
    return fd


def _enter(namespace: int) -> None:
    there = os.fstat(namespace)
    here = os.stat("/proc/thread-self/ns/net")  # noqa: PTH116 - beside fstat
    if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
        raise Failed("that network namespace is the host's own")
    if _libc.setns(namespace, _CLONE_NEWNET) != 0:
        raise Failed(f"cannot enter a network namespace: {os.strerror(ctypes.get_errno())}")
