"""Open TAPs as the devices of a VMM, and what crosvm finds of them in a network namespace of its own."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from vmsilod import host as host_module
from vmsilod.errors import StartFailed
from vmsilod.host import Host, has_vhost_net
from vmsilod.network import devices
from vmsilod.network.devices import open_devices, place_stand_ins, read_name
from vmsilod.network.plan import Port
from vmsilod.vmm.choose import KvmStatus, VmmKind
from vmsilod.vmm.drivers import DRIVERS

if TYPE_CHECKING:
    from collections.abc import Iterator

QEMU, CROSVM = DRIVERS[VmmKind.QEMU], DRIVERS[VmmKind.CROSVM]
TUNSETIFF = 0x400454CA
TAP = 0x2 | 0x1000 | 0x4000 | 0x100  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE


@dataclass(frozen=True)
class Open:
    port: Port
    tap_fds: list[int]


def host_with(*, vhost_net: bool) -> Host:
    kvm = KvmStatus(usable=True, reason="")
    return Host(0, kernel_vsock=True, hybrid_device=None, groups=frozenset(), kvm=kvm, vhost_net=vhost_net)


@pytest.fixture
def tap() -> Iterator[Open]:
    fds = [os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC) for _ in range(2)]
    for fd in fds:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"banking-0", TAP))
    yield Open(Port("banking", "wan", "banking-0", "02:00:00:00:00:01", queues=2), fds)
    for fd in fds:
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


def test_without_vhost_net_a_device_is_the_queues_of_its_tap(tap: Open) -> None:
    (device,) = open_devices([tap], QEMU, host_with(vhost_net=False))
    assert (device.name, device.mac) == ("wan", "02:00:00:00:00:01")
    assert device.tap_fds == tuple(tap.tap_fds)
    assert not device.vhost_fds
    assert read_name(device.tap_fds[1]) == "banking-0"


def test_with_vhost_net_there_is_one_for_each_queue(tap: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not every kernel has the module. What counts here is which node is opened, how often and for whom.
    monkeypatch.setattr(devices, "VHOST_NET", Path("/dev/zero"))
    (device,) = open_devices([tap], QEMU, host_with(vhost_net=True))
    leads_to = [os.readlink(f"/proc/self/fd/{fd}") for fd in device.vhost_fds]  # noqa: PTH115
    assert leads_to == ["/dev/zero", "/dev/zero"]
    for fd in device.vhost_fds:
        os.close(fd)
    (device,) = open_devices([tap], CROSVM, host_with(vhost_net=True))
    assert not device.vhost_fds


def test_a_vhost_net_that_is_gone_leaves_nothing_open(tap: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
    monkeypatch.setattr(devices, "VHOST_NET", Path("/dev/does-not-exist"))
    with pytest.raises(StartFailed, match="does-not-exist"):
        open_devices([tap], QEMU, host_with(vhost_net=True))
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_vhost_net_is_there_where_its_node_can_be_opened() -> None:
    assert has_vhost_net(Path("/dev/null"))
    assert not has_vhost_net(Path("/dev/does-not-exist"))
    assert Path("/dev/vhost-net") == host_module.VHOST_NET


def test_a_stand_in_has_the_taps_name_in_the_other_namespace_alone(tap: Open, stranger: int) -> None:
    nets = open_devices([tap], CROSVM, host_with(vhost_net=False))
    assert "banking-0" not in devices_of(stranger)
    place_stand_ins(nets, stranger)
    place_stand_ins(nets, stranger)
    there = devices_of(stranger)
    assert "banking-0: <BROADCAST,MULTICAST> mtu 1500" in there
    here = subprocess.run(["ip", "-o", "-d", "link"], capture_output=True, text=True, check=True).stdout
    assert here.count("banking-0") == 1
    assert "tun type tap" in here


def test_no_stand_in_in_a_process_that_is_gone(tap: Open) -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    nets = open_devices([tap], CROSVM, host_with(vhost_net=False))
    with pytest.raises(StartFailed, match="stand-in for 'banking-0'"):
        place_stand_ins(nets, process.pid)


def test_what_is_no_tap_has_no_name() -> None:
    with Path("/dev/null").open() as null, pytest.raises(StartFailed, match="not that of a TAP"):
        read_name(null.fileno())
