"""A coroutine of vmsilod's in a test: the main loop runs until it has ended. Whoever imports this is skipped
where there is no python3-gi.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import pytest

pytest.importorskip("gi", reason="needs python3-gi")

from gi.repository import GLib
from vmsilod import loop

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")


def run(coro: Coroutine[Any, Any, T]) -> T:
    main_loop = GLib.MainLoop()
    future = loop.spawn(coro)
    future.add_done_callback(lambda _: loop.call_soon(main_loop.quit))
    main_loop.run()
    return future.result(0)
