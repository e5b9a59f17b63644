"""What a hostile guest, or its VMM, can do to others in a bridge by the open descriptor of its TAP."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest
from main_loop import run
from net import packets
from net.packets import BROADCAST, Way
from net.tap_ground import SHORT, heard, peer, received
from pool_tools import applied, ip, pool_at, require_workers_here, vm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from net.tap_ground import Peer
    from vmsilod.config.model import VmConfig
    from vmsilod.network.pool import NetworkPool

SIOCSIFHWADDR, ARPHRD_ETHER = 0x8924, 1  # linux/sockios.h, linux/if_arp.h
NOBODY = 65534
MAC, OWN, GATEWAY = "02:00:00:00:00:01", "192.168.5.12", "192.168.5.1"
SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17  # linux/sockios.h, linux/ethtool.h
NEEDS_CSUM = 1  # linux/virtio_net.h
TAIL = b"from the guest"


@pytest.fixture(autouse=True)
def workers_here() -> None:
    require_workers_here()


@pytest.fixture
def pool(tmp_path: Path) -> NetworkPool:
    return pool_at(tmp_path / "lent")


@pytest.fixture
def lan() -> Iterator[Peer]:
    """A machine of the LAN in the bridge br0. Checksums are written by the host, as by a network card."""
    ip("link", "add", "br0", "type", "bridge")
    ip("link", "set", "br0", "up")
    with peer("lan", "192.168.5.7/24") as made:
        ip("link", "set", "lan", "master", "br0")
        order = ctypes.create_string_buffer(struct.pack("II", ETHTOOL_STXCSUM, 0), 8)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            request = struct.pack("16sQ16x", b"lan", ctypes.addressof(order))
            fcntl.ioctl(any_socket, SIOCETHTOOL, request)
        yield made


def bridged(vmm: str) -> VmConfig:
    return vm(1, vmm=vmm, addresses=[f"{OWN}/24"], tap={"host_address": None, "bridge": "br0"})


def with_sum(frame: bytes, start: int, wanted: int) -> bytes:
    """The frame with two last bytes such that its checksum from `start` on is `wanted`."""
    rest = packets.checksum(frame[start:] + bytes(2))
    return frame + struct.pack("!H", (rest - wanted) % 0xFFFF)


def claim(address: str) -> bytes:
    return packets.arp(Way(MAC, BROADCAST, address, "192.168.5.7"), operation=2) + TAIL


def test_the_kernel_writes_nothing_into_a_frame_that_was_judged(pool: NetworkPool, lan: Peer) -> None:
    """The end of the sender's address, 30 bytes into the frame, is where the checksum would go."""
    applied(pool, bridged("qemu"))
    (opened,) = run(pool.open("vm1"))
    (fd,) = opened.tap_fds
    frame = with_sum(claim(OWN), 20, 0x0501)
    order = struct.pack("<BBHHHH", NEEDS_CSUM, 0, 0, 0, 20, 10)
    with lan.raw_socket() as line:
        os.write(fd, order + frame)
        assert not heard(line, TAIL)
        os.write(fd, frame)
        assert heard(line, frame)
        os.write(fd, claim(GATEWAY))
        assert not heard(line, TAIL)
    os.close(fd)


@pytest.mark.parametrize("vmm", ["crosvm", "cloud-hypervisor"])
def test_with_the_header_that_some_vmms_insist_on_it_does(pool: NetworkPool, lan: Peer, vmm: str) -> None:
    """Not held, and said so in docs/threat-model.md; it shows that the test above would see it."""
    applied(pool, bridged(vmm))
    assert "vnet_hdr on" in ip("-d", "link", "show", "vm1-0")
    (opened,) = run(pool.open("vm1"))
    (fd,) = opened.tap_fds
    order = struct.pack("<BBHHHH", NEEDS_CSUM, 0, 0, 0, 20, 10)
    with lan.raw_socket() as line:
        os.write(fd, order + with_sum(claim(OWN), 20, 0x0501))
        assert heard(line, claim(GATEWAY))
    os.close(fd)


def test_a_tap_for_another_vmm_is_made_anew(pool: NetworkPool, lan: Peer) -> None:
    del lan
    applied(pool, bridged("crosvm"))
    applied(pool, bridged("qemu"))
    assert "vnet_hdr off" in ip("-d", "link", "show", "vm1-0")
    (opened,) = run(pool.open("vm1"))
    # The VMM looks what it got, and cannot change it: linux/if_tun.h.
    answer = bytearray(40)
    fcntl.ioctl(opened.tap_fds[0], 0x800454D2, answer)
    assert not struct.unpack_from("H", answer, 16)[0] & 0x4000
    with pytest.raises(FileExistsError):
        fcntl.ioctl(opened.tap_fds[0], 0x400454CA, struct.pack("16sH22x", b"vm1-0", 0x5002))
    os.close(opened.tap_fds[0])


def change_mac(fd: int, mac: str) -> None:
    """As a VMM that its guest took over does it: without a right to anything."""
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        request = struct.pack("16sH6s16x", b"vm1-0", ARPHRD_ETHER, packets.mac_bytes(mac))
        fcntl.ioctl(fd, SIOCSIFHWADDR, request)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_vmm_that_takes_the_address_of_another_machine_does_not_keep_its_traffic(
    pool: NetworkPool, lan: Peer
) -> None:
    ip("addr", "add", "192.168.5.2/24", "dev", "br0")
    vms = (
        bridged("qemu"),
        vm(2, addresses=["192.168.5.13/24"], tap={"host_address": None, "bridge": "br0"}),
    )
    applied(pool, *vms)
    (opened,) = run(pool.open("vm1"))
    (fd,) = opened.tap_fds
    (other,) = run(pool.open("vm2"))
    to_lan = Way("02:00:00:00:00:02", lan.mac(), "192.168.5.13", "8.8.8.8")
    with (
        lan.udp_socket(7000) as server,
        lan.raw_socket() as line,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host,
    ):
        host.connect(("192.168.5.7", 7000))
        host.send(b"before")
        assert received(server)
        change_mac(fd, lan.mac())
        host.send(b"stolen")
        assert not received(server, SHORT)
        applied(pool, *vms)  # what vmsilod does when it hears of it
        assert "master" not in ip("link", "show", "vm1-0")
        host.send(b"back")
        assert received(server)
        os.write(other.tap_fds[0], packets.udp(to_lan, 4000, 7000, b"from vm2"))
        assert heard(line, b"from vm2")
        change_mac(fd, "fe:00:00:00:00:01")
        applied(pool, *vms)
        shown = ip("link", "show", "vm1-0")
        assert "master" not in shown
        assert ",UP" not in shown
    os.close(other.tap_fds[0])
    os.close(fd)
    run(pool.close("vm1"))
    shown = ip("link", "show", "vm1-0")
    assert "master br0" in shown
    assert "alias vmsilo:vm1:eth0\n" in shown
    (opened,) = run(pool.open("vm1"))
    os.close(opened.tap_fds[0])
