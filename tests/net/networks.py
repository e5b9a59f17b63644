"""VM-to-VM networks for tests: holders that are plain processes in place of units, guests that sit on their
TAP's descriptors, and the GLib loop run until something is done.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_interface, ip_network
from typing import TYPE_CHECKING

from main_loop import run
from net.frames import IPV4, IPV6, Ends, Frame, arp, ethernet, ip_udp
from vmsilod.network.plan import NetworkPlan, Port
from vmsilod.network.switch import Switches

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

HEADER = 10  # bytes of struct virtio_net_hdr in front of each frame, where the port has it
ANSWER_SECONDS = 2.0
QUIET_SECONDS = 0.15
LAN = "lan"


class ProcessHolders:
    """What SwitchUnits does with systemd, with processes of this one."""

    def __init__(self) -> None:
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    async def find(self) -> frozenset[str]:
        return frozenset(self.processes)

    async def hold(self, networks: frozenset[str]) -> None:
        for network in networks - self.processes.keys():
            self.processes[network] = subprocess.Popen(
                ["unshare", "--net", "sh", "-c", "echo; exec sleep infinity"], stdout=subprocess.PIPE
            )
            stdout = self.processes[network].stdout
            assert stdout is not None
            stdout.readline()

    async def open(self, network: str) -> int:
        return os.open(f"/proc/{self.processes[network].pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    async def release(self, networks: frozenset[str]) -> None:
        for network in networks:
            process = self.processes.pop(network)
            process.kill()
            process.communicate()


@dataclass
class Guest:
    """One VM on a network: what it has, and the descriptor that its VMM would have."""

    port: Port
    fd: int

    @property
    def mac(self) -> str:
        return self.port.mac

    @property
    def _header(self) -> int:
        return HEADER if self.port.offload else 0

    def address(self, version: int = 4) -> str:
        return next(str(own.ip) for own in self.port.addresses if own.version == version)

    def send(self, frame: bytes) -> None:
        os.write(self.fd, bytes(self._header) + frame)

    def receive(self, seconds: float = ANSWER_SECONDS) -> Frame | None:
        """The next frame, None when none comes."""
        if not select.select([self.fd], [], [], seconds)[0]:
            return None
        return Frame(os.read(self.fd, 70_000)[self._header :])

    def find(self, payload: bytes, seconds: float = ANSWER_SECONDS) -> Frame | None:
        """The frame with that UDP payload; others are passed over."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            frame = self.receive(left)
            if frame is not None and frame.payload == payload:
                return frame
        return None

    def drain(self) -> list[Frame]:
        frames = []
        while (frame := self.receive(QUIET_SECONDS)) is not None:
            frames.append(frame)
        return frames

    def resolve(self, address: str) -> str | None:
        """The MAC that is answered to an ARP request."""
        ask = arp(1, (self.mac, self.address()), ("00:00:00:00:00:00", address))
        self.send(ethernet(Ends(self.mac, "ff:ff:ff:ff:ff:ff"), 0x0806, ask))
        while (frame := self.receive(0.5)) is not None:
            if frame.kind == 0x0806:
                return frame.macs.source
        return None

    def udp(self, destination: str, payload: bytes, source: str | None = None) -> None:
        """A packet over the gateway, which is whoever answers for the network: the port's other end."""
        version = 6 if ":" in destination else 4
        ips = Ends(source or self.address(version), destination)
        kind = IPV6 if version == 6 else IPV4
        self.send(ethernet(Ends(self.mac, gateway_of(self.port)), kind, ip_udp(ips, payload)))


def gateway_of(port: Port) -> str:
    """The MAC of the host's end of a port (sight.host_mac)."""
    return f"fe{port.mac[2:]}"


def make_port(vm: str, number: int, **more: Any) -> Port:
    addresses = (ip_interface(f"10.1.0.{number}/24"), ip_interface(f"fd00:1::{number}/64"))
    return Port(
        **{
            "vm": vm,
            "interface": "lan",
            "tap": f"{vm}-0",
            "mac": f"02:00:00:00:00:{number:02x}",
            "network": LAN,
            "addresses": addresses,
            **more,
        }
    )


def make_router(vm: str, number: int, *served: str, **more: Any) -> Port:
    return make_port(vm, number, served=tuple(ip_network(text) for text in served), **more)


class Desk:
    """Switches with a plan applied, and guests that are plugged in."""

    def __init__(self, *ports: Port) -> None:
        self.holders = ProcessHolders()
        self.switches = Switches(self.holders)
        self._stack = ExitStack()
        self._stack.callback(self._release)
        try:
            self.apply(*ports)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Desk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _release(self) -> None:
        run(self.holders.release(frozenset(self.holders.processes)))

    def apply(self, *ports: Port) -> None:
        run(self.switches.apply(NetworkPlan(ports)))
        assert not self.switches.faults

    def plug(self, port: Port) -> Guest:
        fds = run(self.switches.open(port))
        for fd in fds:
            self._stack.callback(_close, fd)
        guest = Guest(port, fds[0])
        guest.drain()
        return guest

    def inside(self, *argv: str, network: str = LAN) -> str:
        """The output of a program in the network's namespace."""
        pid = str(self.holders.processes[network].pid)
        return subprocess.run(
            ["nsenter", "-t", pid, "-n", *argv], capture_output=True, text=True, check=True
        ).stdout

    def dropped(self, counter: str) -> int:
        words = self.inside("nft", "list", "counter", "netdev", "vmsilo", counter).split()
        return int(words[words.index("packets") + 1])


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):  # the test has done it: its VM ended
        os.close(fd)
