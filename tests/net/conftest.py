"""Fixtures for the tier `net`: real TAPs, routes and nftables in network namespaces of the tests' own.

No container and no guest: the test itself sits on the TAP's descriptor, as a VMM would. While a test of this
folder runs, this process is in a network namespace that ends with it, and /sys shows that one.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

CLONE_NEWNS, CLONE_NEWNET = 0x20000, 0x40000000  # linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="session", autouse=True)
def own_network() -> Iterator[None]:
    """Skip with the name of the ability that is missing; never touch the machine's own network."""
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    if not Path("/dev/net/tun").exists():
        pytest.skip("no /dev/net/tun")
    for program in ("nft", "ip"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not in PATH")
    old = [os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("net", "mnt")]
    here = Path.cwd()
    try:
        if _libc.unshare(CLONE_NEWNET | CLONE_NEWNS) != 0:
            pytest.skip(f"no network namespaces: {os.strerror(ctypes.get_errno())}")
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "sysfs", "sysfs", "/sys"], check=True)
        yield
    finally:
        for fd in old:
            _libc.setns(fd, 0)
            os.close(fd)
        os.chdir(here)


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
