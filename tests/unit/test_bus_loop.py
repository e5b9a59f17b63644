"""The coroutine driver on a real GLib loop."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import Future

import pytest

pytest.importorskip("gi", reason="needs python3-gi")

from gi.repository import GLib
from main_loop import run
from vmsilod import loop


async def fail() -> None:
    raise KeyError("oops")


def test_work_is_done_elsewhere_and_goes_on_here() -> None:
    async def work() -> tuple[bool, bool]:
        there = await loop.in_worker(threading.get_ident)
        return there != threading.get_ident(), threading.current_thread() is threading.main_thread()

    assert run(work()) == (True, True)


def test_paths_that_do_not_answer_hold_up_nobody_else() -> None:
    gate = threading.Event()

    async def work() -> int:
        stuck = [loop.spawn(loop.in_patient_worker(gate.wait, 30)) for _ in range(loop.PATIENT + 1)]
        try:
            return await loop.with_deadline(loop.in_worker(int, "7"), 5)
        finally:
            gate.set()
            for each in stuck:
                await loop.wait_for(each)

    assert run(work()) == 7


def test_a_failure_reaches_who_waits_and_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def outer() -> str:
        try:
            await loop.wait_for(loop.spawn(fail()))
        except KeyError:
            return "caught"
        return ""

    assert run(outer()) == "caught"
    assert not caplog.records


def test_a_failure_that_nobody_waits_for_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def outer() -> None:
        loop.spawn(fail())
        await loop.after(0.01)

    run(outer())
    assert [record.getMessage() for record in caplog.records] == ["a background task failed"]


def test_an_exit_in_a_coroutine_does_not_end_the_program() -> None:
    async def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        run(leave())


def test_a_deadline_ends_the_wait_and_not_the_work(caplog: pytest.LogCaptureFixture) -> None:
    async def outer() -> list[str]:
        slow: Future[str] = Future()
        with pytest.raises(TimeoutError):
            await loop.with_deadline(slow, 0.01)
        slow.set_exception(KeyError("late"))
        quick: Future[str] = Future()
        loop.call_later(0.01, quick.set_result, "quick")
        return [await loop.with_deadline(quick, 5), await loop.with_deadline(loop.in_worker(str, 7), 5)]

    assert run(outer()) == ["quick", "7"]
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


def test_a_watch_survives_a_callback_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    read, write = os.pipe()
    seen: list[bytes] = []

    def ready() -> None:
        seen.append(os.read(read, 1))
        raise ValueError("bad byte")

    async def outer() -> None:
        source = loop.watch_fd(read, ready)
        os.write(write, b"ab")
        await loop.after(0.02)
        GLib.source_remove(source)
        os.write(write, b"c")
        await loop.after(0.02)

    run(outer())
    os.close(read)
    os.close(write)
    assert seen == [b"a", b"b"]
    assert len(caplog.records) == 2
