"""Fixtures for all tiers: the container host, booted once per session for the tiers that need it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
from hosts.container import Container

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator


# Below nohup or a shell's `&` these are ignored, and every program that a test starts would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
# Ended like that, a session gives back what its tests have made.
signal.signal(signal.SIGTERM, lambda *_: pytest.exit("ended by SIGTERM", 143))


LAST_WORDS = "vmsilo list; journalctl -q --no-pager -o short-precise -n 50 -u 'vmsilo*' | cut -c 1-180"


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With a test that failed: what the host knew of it."""
    report = yield
    host = getattr(item, "funcargs", {}).get("booted_host")
    if report.failed and isinstance(host, Container):
        with contextlib.suppress(subprocess.SubprocessError):
            told = host.run(LAST_WORDS, check=False, timeout=30)
            report.sections.append(("the host's last words", told.stdout + told.stderr))
    return report
