"""What crosvm finds of its TAPs in a network namespace of its own."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from vmsilod.errors import StartFailed
from vmsilod.network.stand_ins import place_stand_ins, read_name
from vmsilod.vmm.launch import NetDevice

if TYPE_CHECKING:
    from collections.abc import Iterator

TUNSETIFF = 0x400454CA
TAP = 0x2 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR


@pytest.fixture
def net() -> Iterator[NetDevice]:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"banking-0", TAP))
    yield NetDevice("wan", "02:00:00:00:00:01", (fd,))
    os.close(fd)


@pytest.fixture
def stranger() -> Iterator[int]:
    """A process in a network namespace of its own."""
    with subprocess.Popen(["unshare", "-n", "sh", "-c", "echo; exec cat"], stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def devices_of(pid: int) -> str:
    listed = ["nsenter", "-t", str(pid), "-n", "ip", "-o", "link"]
    return subprocess.run(listed, capture_output=True, text=True, check=True).stdout


def test_a_stand_in_has_the_taps_name_in_the_other_namespace_alone(net: NetDevice, stranger: int) -> None:
    assert "banking-0" not in devices_of(stranger)
    place_stand_ins([net], stranger)
    place_stand_ins([net], stranger)
    assert "banking-0: <BROADCAST,MULTICAST> mtu 1500" in devices_of(stranger)
    here = subprocess.run(["ip", "-o", "-d", "link"], capture_output=True, text=True, check=True).stdout
    assert here.count("banking-0") == 1
    assert "tun type tap" in here


def test_no_stand_in_for_a_process_that_is_gone(net: NetDevice) -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    with pytest.raises(StartFailed, match="stand-in for 'banking-0'"):
        place_stand_ins([net], process.pid)


def test_what_is_no_tap_has_no_name() -> None:
    with Path("/dev/null").open() as null, pytest.raises(StartFailed, match="not that of a TAP"):
        read_name(null.fileno())
