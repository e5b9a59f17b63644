"""A session of pyroute2 whose errors are vmsilo's own.

Used by links.py and routes.py, in the worker or in a thread that is in a network's namespace; it lives for
one piece of work.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vmsilod.errors import Failed

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def open_session() -> Iterator[Any]:
    # Late: 130 ms, and a host whose VMs are all offline never needs it.
    from pyroute2 import IPRoute

    with translated("open a netlink socket"):
        session = IPRoute()
    try:
        yield session
    finally:
        session.close()


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raises Failed: "cannot WHAT", and the kernel's reason."""
    from pyroute2 import NetlinkError

    try:
        yield
    except NetlinkError as error:
        raise Failed(f"cannot {what}: {error.args[1] if len(error.args) > 1 else error.code}") from error
    except OSError as error:
        raise Failed(f"cannot {what}: {error.strerror}") from error
