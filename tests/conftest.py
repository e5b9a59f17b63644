"""Fixtures for all tiers: the container host, booted once per session for the tiers that need it."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from hosts.container import Container

if TYPE_CHECKING:
    from collections.abc import Iterator


# Below nohup or a shell's `&` these are ignored, and every program that a test starts would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def require_container() -> None:
    """Skip with the name of the ability that is missing."""
    if os.geteuid() != 0:
        pytest.skip("needs root: the container host is started by systemd-nspawn")


@pytest.fixture(scope="session")
def booted_host() -> Iterator[Container]:
    """A container host with vmsilo installed and the default image; no configuration yet."""
    require_container()
    with Container() as host:
        yield host
