"""What the bus shows and whom it calls: the view of one VM, changes of views, and the Domain behind them.

The lifecycle implements Domain; the bus package sees nothing else of vmsilod. Values only, no state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from gi.repository import GLib

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmsilod.bus.requests import DisposableRequest, RunRequest, SshRequest
    from vmsilod.pci.ledger import PciView

TEXT_MAX = 600


@dataclass(frozen=True)
class VmView:
    """A VM as everybody with the view action sees it.

    `since` is CLOCK_REALTIME in microseconds, memory in MiB. `start_over`: when the last start had got as
    far as its VMM or had failed, CLOCK_MONOTONIC in microseconds; 2**64-1 while one is under way.
    """

    name: str
    state: str
    status: str = ""
    color: str = ""
    memory: int = 0
    cpus: int = 0
    vmm: str = ""
    restart_needed: bool = False
    problems: tuple[str, ...] = ()
    pid: int = 0
    uid: int = 0
    cid: int = 0
    since: int = 0
    start_over: int = 0
    last_result: str = ""
    last_outcome: str = ""
    auto_start: bool = False
    depends_on: tuple[str, ...] = ()
    unit: str = ""
    restart_reasons: tuple[str, ...] = ()
    image: str = ""
    image_version: str = ""
    disposable: bool = False
    template: str = ""
    shares: tuple[str, ...] = ()


@dataclass(frozen=True)
class UsbView:
    """A USB device of the host. `rule` and `obstacle` are for people."""

    port: str
    vendor: str
    product: str
    serial: str = ""
    title: str = ""
    kinds: tuple[str, ...] = ()
    speed: str = ""
    hub: bool = False
    host_drivers: tuple[str, ...] = ()
    vm: str = ""
    rule: str = ""
    obstacle: str = ""


@dataclass(frozen=True)
class NetworkView:
    """A VM's interface and its TAP or macvtap on the host; `kind` is the interface's type, `network` what it
    is on: the VM-to-VM network, the macvtap's link, the TAP's bridge. `received` and `sent` are bytes as the
    VM sees them; `state` is up (the VM has it open), idle (nobody has), detached (a running VM could have
    it) or broken, with `problem` for people. `denied` counts packets of the VM to where it may not go,
    `dropped` all others that the rules refused, by why.
    """

    interface: str
    tap: str
    mac: str
    state: str
    problem: str = ""
    received: int = 0
    sent: int = 0
    denied: int = 0
    dropped: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    kind: str = "tap"
    network: str = ""


@dataclass(frozen=True)
class DiskView:
    """A VM's disk beside its root. `state` is for people: in use, idle, not created (the next start makes
    it), missing, ephemeral (gone with each run), left behind (its VM is configured no more). Sizes are
    bytes; `allocated` is what the file takes of the host's disk.
    """

    vm: str
    id: str
    path: str
    state: str
    size: int = 0
    allocated: int = 0
    format: str = "raw"
    readonly: bool = False
    mount: str = ""


@dataclass(frozen=True)
class VmRemoved:
    name: str


@dataclass(frozen=True)
class Reloaded:
    """The configuration has been read again: so many VMs, so many problems."""

    vms: int
    problems: int


Change = VmView | VmRemoved | Reloaded


class UsbDomain(Protocol):
    """USB devices of the host, as Domain. An address is BUS-PORT, VID:PID or VID:PID:SERIAL."""

    async def list_devices(self) -> Sequence[UsbView]: ...

    async def attach(self, name: str, untrusted_address: str) -> None: ...

    async def detach(self, name: str, untrusted_address: str) -> None: ...

    async def release(self, untrusted_address: str) -> None:
        """Let the host's drivers have it again."""


class DisposableDomain(Protocol):
    """Disposables, as Domain."""

    async def create(self, request: DisposableRequest) -> tuple[str, Sequence[str]]:
        """A name, and what it lacks of its template, for people. It lives until the connection of the
        request has gone; the descriptor of a shared directory stays the caller's.
        """


class DiskDomain(Protocol):
    """The disks of VMs, as Domain."""

    async def list_disks(self, name: str) -> Sequence[DiskView]:
        """Of one VM, or of all for ""."""

    async def grow(self, name: str, disk: str, size: int) -> None: ...

    async def remove(self, name: str, disk: str) -> None: ...


class Domain(Protocol):
    """The VMs. Called on the loop; whatever goes wrong is a VmsiloError."""

    def list_vms(self) -> Sequence[VmView]: ...

    async def start(self, name: str, *, wait: bool) -> None: ...

    async def stop(self, name: str, timeout: int | None) -> None:
        """Done when the VM has ended; after `timeout` seconds it is killed."""

    async def kill(self, name: str) -> None: ...

    async def restart(self, name: str, timeout: int | None) -> None: ...

    async def run(self, request: RunRequest) -> int:
        """A descriptor connected to the guest agent, with SPAWN sent. The caller owns it."""

    async def read_memory(self, name: str) -> Mapping[str, int]:
        """MiB: configured, maximum, and of a running VM requested and actual."""

    async def resize_memory(self, name: str, size: int) -> Mapping[str, int]:
        """As read_memory; the guest has been asked to have `size` MiB."""

    async def read_network(self, name: str) -> Sequence[NetworkView]:
        """In the order of the VM's configuration; nothing for an offline VM."""

    async def attach_interface(self, name: str, interface: str) -> None:
        """A VM that runs gets an interface that its file has."""

    async def detach_interface(self, name: str, interface: str) -> None:
        """A VM that runs has it no more, until it is attached again or the VM is started anew."""

    async def open_ssh(self, request: SshRequest) -> tuple[int, int, str, str]:
        """A descriptor connected to the guest's sshd and one of the login's private key, both the caller's
        to close; the login's name; the guest's public host key."""

    async def reload(self) -> Sequence[str]: ...

    async def check(self) -> Sequence[Mapping[str, str]]: ...

    async def find_pci(self) -> Sequence[PciView]: ...

    async def claim_pci(self, address: str) -> None: ...

    async def release_pci(self, address: str) -> str:
        """The host's driver that has the device now, "" for none."""

    async def start_debug(self, name: str, fds: tuple[int, int, int]) -> str:
        """The unit that runs the VM. From the call on the domain owns the descriptors, whatever happens."""

    @property
    def usb(self) -> UsbDomain: ...

    @property
    def disposables(self) -> DisposableDomain: ...
    @property
    def disks(self) -> DiskDomain: ...

    def subscribe(self, callback: Callable[[Change], None]) -> Callable[[], None]:
        """Call back on the loop after every change, until the returned function is called."""


# D-Bus property -> (type, field of VmView). `Status` and `Problems` may quote a guest or a file.
_PROPERTIES: dict[str, tuple[str, str]] = {
    "Name": ("s", "name"),
    "State": ("s", "state"),
    "Status": ("s", "status"),
    "Color": ("s", "color"),
    "Memory": ("u", "memory"),
    "Cpus": ("u", "cpus"),
    "Vmm": ("s", "vmm"),
    "RestartNeeded": ("b", "restart_needed"),
    "Problems": ("as", "problems"),
    "Pid": ("u", "pid"),
    "Uid": ("u", "uid"),
    "Cid": ("u", "cid"),
    "Since": ("t", "since"),
    "StartOverMonotonic": ("t", "start_over"),
    "LastResult": ("s", "last_result"),
    "LastOutcome": ("s", "last_outcome"),
    "AutoStart": ("b", "auto_start"),
    "DependsOn": ("as", "depends_on"),
    "Shares": ("as", "shares"),
    "Unit": ("s", "unit"),
    "RestartReasons": ("as", "restart_reasons"),
    "Image": ("s", "image"),
    "ImageVersion": ("s", "image_version"),
    "Disposable": ("b", "disposable"),
    "Template": ("s", "template"),
}


_PCI_ENTRIES: dict[str, tuple[str, str]] = {
    "Address": ("s", "address"),
    "Class": ("s", "class_code"),
    "Name": ("s", "name"),
    "Driver": ("s", "driver"),
    "Group": ("i", "group"),
    "State": ("s", "state"),
    "Vm": ("s", "vm"),
    "Isolated": ("b", "isolated"),
    "Resets": ("as", "resets"),
    "Note": ("s", "note"),
}


def pack_pci(view: PciView) -> dict[str, GLib.Variant]:
    return {name: _pack(kind, getattr(view, field)) for name, (kind, field) in _PCI_ENTRIES.items()}


_NETWORK_ENTRIES: dict[str, tuple[str, str]] = {
    "Interface": ("s", "interface"),
    "Tap": ("s", "tap"),
    "Mac": ("s", "mac"),
    "State": ("s", "state"),
    "Problem": ("s", "problem"),
    "Received": ("t", "received"),
    "Sent": ("t", "sent"),
    "Denied": ("t", "denied"),
    "Dropped": ("a{st}", "dropped"),
    "Type": ("s", "kind"),
    "Network": ("s", "network"),
}


def pack_network(view: NetworkView) -> dict[str, GLib.Variant]:
    return {name: _pack(kind, getattr(view, field)) for name, (kind, field) in _NETWORK_ENTRIES.items()}


_DISK_ENTRIES: dict[str, tuple[str, str]] = {
    "Vm": ("s", "vm"),
    "Id": ("s", "id"),
    "Path": ("s", "path"),
    "State": ("s", "state"),
    "Size": ("t", "size"),
    "Allocated": ("t", "allocated"),
    "Format": ("s", "format"),
    "Readonly": ("b", "readonly"),
    "Mount": ("s", "mount"),
}


def pack_disk(view: DiskView) -> dict[str, GLib.Variant]:
    return {name: _pack(kind, getattr(view, field)) for name, (kind, field) in _DISK_ENTRIES.items()}


_USB_PROPERTIES: dict[str, tuple[str, str]] = {
    "Port": ("s", "port"),
    "Vendor": ("s", "vendor"),
    "Product": ("s", "product"),
    "Serial": ("s", "serial"),
    "Title": ("s", "title"),
    "Kinds": ("as", "kinds"),
    "Speed": ("s", "speed"),
    "Hub": ("b", "hub"),
    "HostDrivers": ("as", "host_drivers"),
    "Vm": ("s", "vm"),
    "Rule": ("s", "rule"),
    "Obstacle": ("s", "obstacle"),
}


def pack_usb(view: UsbView) -> dict[str, GLib.Variant]:
    return {name: _pack(kind, getattr(view, field)) for name, (kind, field) in _USB_PROPERTIES.items()}


def pack_properties(view: VmView, names: Iterable[str] = _PROPERTIES) -> dict[str, GLib.Variant]:
    return {name: _pack(kind, getattr(view, field)) for name in names for kind, field in [_PROPERTIES[name]]}


def find_changes(old: VmView, new: VmView) -> list[str]:
    """The D-Bus names of the properties that differ."""
    return [name for name, (_, field) in _PROPERTIES.items() if getattr(old, field) != getattr(new, field)]


def printable(text: str, limit: int = TEXT_MAX) -> str:
    """The text on one line of bounded length, without control characters, surrogates and bidi marks."""
    return "".join(char if char.isprintable() else "?" for char in text[:limit])


def _pack(kind: str, value: object) -> GLib.Variant:
    if isinstance(value, str):
        value = printable(value)
    elif isinstance(value, tuple):
        value = [printable(item, 4 * TEXT_MAX) for item in value]
    elif isinstance(value, Mapping):
        value = {printable(key): item for key, item in value.items()}
    return GLib.Variant(kind, value)
