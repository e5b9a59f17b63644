"""Fixtures for the tier `net`: real TAPs, routes and nftables in network namespaces of the tests' own.

No container and no guest: the test itself sits on the TAP's descriptor, as a VMM would. The suite starts
this tier below `unshare`; started by hand: `unshare -mn ... pytest tests/net`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session", autouse=True)
def require_namespace() -> None:
    """Skip with the name of the ability that is missing; never touch the machine's own network."""
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    if Path("/proc/self/ns/net").readlink() == Path("/proc/1/ns/net").readlink():
        pytest.skip("not in a network namespace of its own: run it by `make test`, or below `unshare -mn`")
    if not Path("/dev/net/tun").exists():
        pytest.skip("no /dev/net/tun")
    if shutil.which("nft") is None:
        pytest.skip("nft is not in PATH")


@pytest.fixture(autouse=True)
def empty_network() -> Iterator[None]:
    """Each test begins and ends with the loopback device alone and without a ruleset."""
    _clear()
    yield
    _clear()


def _clear() -> None:
    subprocess.run(["nft", "flush", "ruleset"], check=True)
    listed = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        name = line.split(": ")[1].split("@")[0]
        if name != "lo":
            # Not checked: the other end of a pair is gone with the first.
            subprocess.run(["ip", "link", "del", name], capture_output=True, check=False)
