"""A process of its own that serves org.vmsilo1 over VMs in memory.

Run as: python served.py BUS-ADDRESS QUIET-SECONDS, by the fixtures of the bus tests. Only the Domain is
invented; everything before it is the real thing. VMs with particular names behave in particular ways, so
that a test can bring about each outcome from outside.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gi.repository import GLib
from vmsilod import loop
from vmsilod.bus.polkit import Limits, Polkit
from vmsilod.bus.service import connect, serve
from vmsilod.bus.views import Change, DiskView, NetworkView, Reloaded, UsbView, VmRemoved, VmView
from vmsilod.errors import BadRequest, Busy, ConfigBroken, NoSuchVm, NotRunning, StartFailed, Timeout
from vmsilod.pci.address import parse_address
from vmsilod.pci.ledger import PciView

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vmsilod.bus.requests import DisposableRequest, RunRequest, SshRequest

FAILURES: dict[str, tuple[type[BaseException], *tuple[Any, ...]]] = {
    "busy": (Busy, "busy is being stopped", "try again"),
    "refused": (StartFailed, "crosvm ended with status 1"),
    "late": (Timeout, "the guest was not ready in 90 s"),
    "off": (NotRunning, "off is not running"),
    "broken": (ConfigBroken, "broken.toml: memory is not a number"),
    "bug": (RuntimeError, "/secret/path"),
    "exit": (SystemExit, 3),
}
ORDINARY = ("banking", "my-work", "zz")


class UsbInMemory:
    """One stick, and the VM that has it."""

    def __init__(self, vms: VmsInMemory) -> None:
        self.vms = vms
        self.holder = ""

    async def list_devices(self) -> Sequence[UsbView]:
        return [UsbView("1-2", "0951", "1666", title="a\x1b[31m\udc80b", kinds=("storage",), vm=self.holder)]

    async def attach(self, name: str, untrusted_address: str) -> None:
        self.vms.find(name)
        if untrusted_address != "1-2":
            raise BadRequest("no such device")
        self.holder = name

    async def detach(self, name: str, untrusted_address: str) -> None:
        self.vms.find(name)
        self.holder = ""

    async def release(self, untrusted_address: str) -> None:
        if self.holder:
            raise Busy(f"{self.holder} has it")


class DisposablesInMemory:
    async def create(self, request: DisposableRequest) -> tuple[str, Sequence[str]]:
        """The notes tell what was asked for."""
        shared = str(Path(f"/proc/self/fd/{request.shared.fd}").readlink()) if request.shared else ""
        return f"{request.template or 'default'}-d000001", [request.name, str(request.network), shared]


class DisksInMemory:
    """One disk, which grows until it is removed."""

    def __init__(self, vms: VmsInMemory) -> None:
        self.vms = vms
        self.size = 1 << 30

    async def list_disks(self, name: str) -> Sequence[DiskView]:
        return [
            DiskView(name or "banking", "data", "/srv/a\x1bb.img", "idle", size=self.size, mount="/data")
        ]

    async def grow(self, name: str, disk: str, size: int) -> None:
        self.vms.find(name)
        if size <= self.size:
            raise BadRequest(f"{disk} never shrinks")
        self.size = size

    async def remove(self, name: str, disk: str) -> None:
        if disk != "persist":
            raise BadRequest("not vmsilo's")


class VmsInMemory:
    def __init__(self) -> None:
        self.disposables = DisposablesInMemory()
        self.usb = UsbInMemory(self)
        self.disks = DisksInMemory(self)
        self.views = {name: VmView(name, "stopped", memory=512, color="red") for name in ORDINARY}
        self.views |= {name: VmView(name, "stopped", status="a\x1b[31m\udc80b") for name in FAILURES}
        self.attached: set[str] = set()
        self.pci: dict[str, str] = {"0000:01:00.0": "banking"}
        self.callbacks: list[Callable[[Change], None]] = []

    def list_vms(self) -> Sequence[VmView]:
        return list(self.views.values())

    async def start(self, name: str, *, wait: bool) -> None:
        self.find(name)
        self.change(name, "running" if wait else "starting")

    async def stop(self, name: str, timeout: int | None) -> None:
        self.find(name)
        self.change(name, "stopped", last_result=f"timeout-{timeout}")

    async def kill(self, name: str) -> None:
        self.find(name)
        self.change(name, "stopped", last_result="signal")

    async def restart(self, name: str, timeout: int | None) -> None:
        await self.stop(name, timeout)
        await self.start(name, wait=True)

    async def run(self, request: RunRequest) -> int:
        """The other end of the stream tells what was asked for; "slow" takes its time."""
        self.find(request.name)
        if request.argv == ("slow",):
            await loop.after(0.5)
        ours, theirs = socket.socketpair()
        with ours:
            ours.sendall(repr(request).encode())
        return theirs.detach()

    async def read_memory(self, name: str) -> Mapping[str, int]:
        view = self.find(name)
        return {"configured": view.memory, "maximum": 2 * view.memory}

    async def resize_memory(self, name: str, size: int) -> Mapping[str, int]:
        return {**await self.read_memory(name), "requested": size, "actual": size}

    async def read_network(self, name: str) -> Sequence[NetworkView]:
        self.find(name)
        view = NetworkView("eth0", f"{name}-0", "02:00:00:00:00:01", "up", received=1 << 40, denied=3)
        return [dataclasses.replace(view, dropped={"mac": 1 << 40}, network="br0")]

    async def attach_interface(self, name: str, interface: str) -> None:
        self.find(name)
        if interface != "lan" or interface in self.attached:
            raise BadRequest("no such interface, or it is there already")
        self.attached.add(interface)

    async def detach_interface(self, name: str, interface: str) -> None:
        self.find(name)
        self.attached.remove(interface)

    async def open_ssh(self, request: SshRequest) -> tuple[int, int, str, str]:
        """The stream tells what was asked for."""
        self.find(request.name)
        key = os.memfd_create("key")
        os.write(key, b"private")
        ours, theirs = socket.socketpair()
        with ours:
            ours.sendall(repr(request).encode())
        return theirs.detach(), key, "root" if request.root else "user", "ssh-ed25519 AAAA"

    async def reload(self) -> Sequence[str]:
        """Forgets zz, and learns of as many VMs as make a hundred."""
        if self.views.pop("zz", None) is not None:
            self.publish(VmRemoved("zz"))
        for index in range(100 - len(self.views)):
            view = VmView(f"vm{index}", "stopped", depends_on=("banking",))
            self.views[view.name] = view
            self.publish(view)
        self.publish(Reloaded(len(self.views), 1))
        return ["broken.toml: memory is not a number"]

    async def check(self) -> Sequence[Mapping[str, str]]:
        return [{"file": "broken.toml", "key": "memory", "message": "not a number"}]

    async def find_pci(self) -> Sequence[PciView]:
        return [
            PciView(
                address=address,
                class_code="0200",
                name="A card",
                driver="vfio-pci",
                group=7,
                state="used",
                vm=vm,
                isolated=True,
                resets=("flr",),
                note="",
            )
            for address, vm in self.pci.items()
        ]

    async def claim_pci(self, address: str) -> None:
        self.pci[parse_address(address)] = ""

    async def release_pci(self, address: str) -> str:
        del self.pci[parse_address(address)]
        return "e1000e"

    async def start_debug(self, name: str, fds: tuple[int, int, int]) -> str:
        try:
            self.find(name)
            os.write(fds[1], os.read(fds[0], 100).upper())
            return f"vmsilo-{name}-debug.service"
        finally:
            for fd in fds:
                os.close(fd)

    def subscribe(self, callback: Callable[[Change], None]) -> Callable[[], None]:
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)

    def find(self, name: str) -> VmView:
        if name not in self.views:
            raise NoSuchVm(f"there is no VM {name}")
        if name in FAILURES:
            kind, *args = FAILURES[name]
            raise kind(*args)
        return self.views[name]

    def change(self, name: str, state: str, last_result: str = "") -> None:
        self.views[name] = dataclasses.replace(self.views[name], state=state, last_result=last_result)
        self.publish(self.views[name])

    def publish(self, change: Change) -> None:
        for callback in self.callbacks:
            callback(change)


def main() -> None:
    address, quiet_seconds = sys.argv[1], float(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))  # a leak of descriptors shows soon
    main_loop = GLib.MainLoop()
    con = connect(address)
    authority = Polkit(con, Limits(quiet_seconds=quiet_seconds, interactive_seconds=2))
    serve(con, VmsInMemory(), authority, version="1.2", on_closed=main_loop.quit)
    print("ready", flush=True)
    main_loop.run()
    print("closed", flush=True)


if __name__ == "__main__":
    main()
