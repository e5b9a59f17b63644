"""The objects of org.vmsilo1: methods of the bus become calls of the Domain, its changes become signals.

`serve` is called once by the program's constructor; the Service lives until its close() or the end of the
bus connection. Authorisation has happened in export.py when a method here runs.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

import pydbus
from gi.repository import Gio, GLib
from pydbus.generic import signal

from vmsilod import closing, loop
from vmsilod.bus import names, requests
from vmsilod.bus.actions import MANAGER_INTERFACE, OBJECTS_INTERFACE, VIEW, VM_INTERFACE
from vmsilod.bus.callers import Audience, Callers
from vmsilod.bus.export import Call, Gate, Registration, load_interfaces
from vmsilod.bus.faults import FaultLog
from vmsilod.bus.polkit import Authority, Question
from vmsilod.bus.views import (
    Change,
    Domain,
    Reloaded,
    VmRemoved,
    VmView,
    find_changes,
    pack_disk,
    pack_network,
    pack_pci,
    pack_properties,
    pack_usb,
    printable,
)
from vmsilod.errors import Denied, Failed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_DO_NOT_QUEUE = 4  # without ALLOW_REPLACEMENT (1) nobody can take the name away
_PRIMARY_OWNER, _ALREADY_OWNER = 1, 4
_VM_ENTRY = "{oa{sa{sv}}}"


class VmObject:
    """One VM at its path."""

    PropertiesChanged = signal()

    def __init__(self, view: VmView, domain: Domain) -> None:
        self.vm_name: str | None = view.name
        self.path = names.vm_path(view.name)
        self._domain = domain
        self._name = view.name
        self.view = view
        self.properties = pack_properties(view)
        self._listed: GLib.Variant | None = None
        self._entry: GLib.Variant | None = None

    @property
    def listed(self) -> GLib.Variant:
        """Kept until the next change: packing for every reader took 140 ms of the loop for 500 VMs."""
        if self._listed is None:
            self._listed = GLib.Variant("a{sv}", self.properties)
        return self._listed

    @property
    def entry(self) -> GLib.Variant:
        if self._entry is None:
            interfaces = GLib.Variant("a{sa{sv}}", {VM_INTERFACE: self.properties})
            self._entry = GLib.Variant.new_dict_entry(GLib.Variant("o", self.path), interfaces)
        return self._entry

    def update(self, view: VmView) -> None:
        changed = find_changes(self.view, view)
        self.view = view
        if not changed:
            return
        self.properties = self.properties | pack_properties(view, changed)
        self._listed = self._entry = None
        plain = {name: self.properties[name].unpack() for name in changed}
        self.PropertiesChanged(VM_INTERFACE, plain, [])

    def read_properties(self, interface: str) -> Mapping[str, GLib.Variant]:
        return self.properties if interface == VM_INTERFACE else {}

    async def Start(self, _call: Call, options: dict[str, Any]) -> None:
        await _start(self._domain, self._name, options)

    async def Stop(self, _call: Call, options: dict[str, Any]) -> None:
        await self._domain.stop(self._name, requests.parse_stop_timeout(options))

    async def Kill(self, _call: Call) -> None:
        await self._domain.kill(self._name)

    async def Restart(self, _call: Call, options: dict[str, Any]) -> None:
        await self._domain.restart(self._name, requests.parse_stop_timeout(options))

    async def Run(self, call: Call, argv: list[str], options: dict[str, Any]) -> int:
        return await self._domain.run(requests.parse_run(self._name, call.uid, argv, options))

    async def GetMemory(self, _call: Call) -> dict[str, int]:
        return dict(await self._domain.read_memory(self._name))

    async def GetNetwork(self, _call: Call) -> list[dict[str, GLib.Variant]]:
        return [pack_network(view) for view in await self._domain.read_network(self._name)]

    async def AttachInterface(self, _call: Call, interface: str) -> None:
        await self._domain.attach_interface(self._name, interface)

    async def DetachInterface(self, _call: Call, interface: str) -> None:
        await self._domain.detach_interface(self._name, interface)

    async def SetMemory(self, _call: Call, size: int) -> dict[str, int]:
        return dict(await self._domain.resize_memory(self._name, size))

    async def OpenSsh(self, call: Call, options: dict[str, Any]) -> tuple[int, int, str, str]:
        return await self._domain.open_ssh(requests.parse_ssh(self._name, call.uid, options))


class RootObject:
    """The object at /org/vmsilo1: org.vmsilo1.Manager and the ObjectManager."""

    VmStateChanged = signal()
    ConfigurationReloaded = signal()
    InterfacesAdded = signal()
    InterfacesRemoved = signal()

    vm_name: str | None = None

    def __init__(self, domain: Domain, vms: Mapping[str, VmObject], version: str) -> None:
        self._domain = domain
        self._vms = vms
        self._properties = {"Version": GLib.Variant("s", version)}

    def read_properties(self, interface: str) -> Mapping[str, GLib.Variant]:
        return self._properties if interface == MANAGER_INTERFACE else {}

    def List(self, _call: Call) -> GLib.Variant:
        listed = [self._vms[name].listed for name in sorted(self._vms)]
        return GLib.Variant.new_tuple(GLib.Variant.new_array(GLib.VariantType("a{sv}"), listed))

    def GetManagedObjects(self, _call: Call) -> GLib.Variant:
        entries = [vm.entry for vm in self._vms.values()]
        return GLib.Variant.new_tuple(GLib.Variant.new_array(GLib.VariantType(_VM_ENTRY), entries))

    async def Start(self, _call: Call, name: str, options: dict[str, Any]) -> None:
        await _start(self._domain, name, options)

    async def Stop(self, _call: Call, name: str, options: dict[str, Any]) -> None:
        await self._domain.stop(name, requests.parse_stop_timeout(options))

    async def Kill(self, _call: Call, name: str) -> None:
        await self._domain.kill(name)

    async def Restart(self, _call: Call, name: str, options: dict[str, Any]) -> None:
        await self._domain.restart(name, requests.parse_stop_timeout(options))

    async def Run(self, call: Call, name: str, argv: list[str], options: dict[str, Any]) -> int:
        return await self._domain.run(requests.parse_run(name, call.uid, argv, options))

    async def GetMemory(self, _call: Call, name: str) -> dict[str, int]:
        return dict(await self._domain.read_memory(name))

    async def GetNetwork(self, _call: Call, name: str) -> list[dict[str, GLib.Variant]]:
        return [pack_network(view) for view in await self._domain.read_network(name)]

    async def AttachInterface(self, _call: Call, name: str, interface: str) -> None:
        await self._domain.attach_interface(name, interface)

    async def DetachInterface(self, _call: Call, name: str, interface: str) -> None:
        await self._domain.detach_interface(name, interface)

    async def SetMemory(self, _call: Call, name: str, size: int) -> dict[str, int]:
        return dict(await self._domain.resize_memory(name, size))

    async def OpenSsh(self, call: Call, name: str, options: dict[str, Any]) -> tuple[int, int, str, str]:
        return await self._domain.open_ssh(requests.parse_ssh(name, call.uid, options))

    async def Reload(self, _call: Call) -> list[str]:
        return [printable(text, 1024) for text in await self._domain.reload()]

    async def Check(self, _call: Call) -> list[dict[str, str]]:
        problems = await self._domain.check()
        return [{key: printable(text, 1024) for key, text in problem.items()} for problem in problems]

    async def ListPci(self, _call: Call) -> list[dict[str, GLib.Variant]]:
        return [pack_pci(view) for view in await self._domain.find_pci()]

    async def ClaimPci(self, _call: Call, address: str) -> None:
        await self._domain.claim_pci(address)

    async def ReleasePci(self, _call: Call, address: str) -> str:
        return printable(await self._domain.release_pci(address))

    async def ListUsb(self, _call: Call) -> list[dict[str, GLib.Variant]]:
        return [pack_usb(view) for view in await self._domain.usb.list_devices()]

    async def AttachUsb(self, _call: Call, name: str, device: str) -> None:
        await self._domain.usb.attach(name, device)

    async def DetachUsb(self, _call: Call, name: str, device: str) -> None:
        await self._domain.usb.detach(name, device)

    async def ReleaseUsb(self, _call: Call, device: str) -> None:
        await self._domain.usb.release(device)

    async def ListDisks(self, _call: Call, name: str) -> list[dict[str, GLib.Variant]]:
        return [pack_disk(view) for view in await self._domain.disks.list_disks(name)]

    async def GrowDisk(self, _call: Call, name: str, disk: str, size: int) -> None:
        await self._domain.disks.grow(name, disk, size)

    async def RemoveDisk(self, _call: Call, name: str, disk: str) -> None:
        await self._domain.disks.remove(name, disk)

    async def StartDebug(self, call: Call, name: str, *handles: int) -> str:
        fds: list[int] = []
        try:
            for handle in handles:
                fds.append(call.take_fd(handle))
        except BaseException:
            closing.close_later(call.uid, fds)
            raise
        call.close()
        stdin, stdout, stderr = fds
        return await self._domain.start_debug(name, (stdin, stdout, stderr))

    async def CreateDisposable(
        self, call: Call, template: str, options: dict[str, Any]
    ) -> tuple[str, list[str]]:
        request = requests.parse_disposable(template, call.uid, call.sender, options)
        name, notes = await self._domain.disposables.create(request)
        return name, [printable(note) for note in notes]

    async def CreateDisposableHere(
        self, call: Call, template: str, handle: int, options: dict[str, Any]
    ) -> tuple[str, list[str]]:
        fd = call.take_fd(handle)
        call.close()
        try:
            request = requests.parse_here(template, call.uid, call.sender, fd, options)
            name, notes = await self._domain.disposables.create(request)
        finally:
            closing.close_later(call.uid, [fd])
        return name, [printable(note) for note in notes]


class Service:
    """Everything of org.vmsilo1 on one bus connection."""

    def __init__(self, con: Gio.DBusConnection, domain: Domain, authority: Authority, version: str) -> None:
        self._con = con
        self._domain = domain
        self._authority = authority
        self._audience = Audience(con)
        self._gate = Gate(Callers(con), authority, self._audience, FaultLog())
        self._interfaces = load_interfaces(
            resources.files("vmsilod.bus").joinpath("org.vmsilo1.xml").read_text(encoding="utf-8")
        )
        self._vms: dict[str, VmObject] = {}
        self._registrations: dict[str, Registration] = {}
        self._root = RootObject(domain, self._vms, version)
        interfaces = [self._interfaces[MANAGER_INTERFACE], self._interfaces[OBJECTS_INTERFACE]]
        self._root_registration = Registration(con, names.ROOT_PATH, self._root, interfaces, self._gate)
        for view in domain.list_vms():
            self._add(view)
        self._unsubscribe = domain.subscribe(self._apply)

    def close(self) -> None:
        """Leave the bus; the connection stays open."""
        self._unsubscribe()
        self._audience.close()
        for registration in (self._root_registration, *self._registrations.values()):
            registration.close()
        self._registrations.clear()
        self._vms.clear()
        if not self._con.is_closed():
            args = GLib.Variant("(s)", (names.SERVICE,))
            _ask_bus(self._con, "ReleaseName", args)

    def _apply(self, change: Change) -> None:
        if isinstance(change, VmView):
            self._apply_view(change)
        elif isinstance(change, VmRemoved):
            self._remove(change.name)
        else:
            self._apply_reload(change)

    def _apply_view(self, view: VmView) -> None:
        vm = self._vms.get(view.name)
        if vm is None:
            self._add(view)
            self._root.InterfacesAdded(names.vm_path(view.name), {VM_INTERFACE: pack_properties(view)})
            return
        old = vm.view
        vm.update(view)
        if old.state != view.state:
            reason = view.last_result if view.state in ("stopped", "failed", "broken") else ""
            self._root.VmStateChanged(view.name, view.state, printable(reason))

    def _apply_reload(self, change: Reloaded) -> None:
        self._root.ConfigurationReloaded(change.vms, change.problems)
        loop.spawn(self._audience.review(self._may_view))

    async def _may_view(self, sender: str, uid: int) -> bool:
        """A new configuration may name another user."""
        try:
            await self._authority.check(Question(sender, uid, VIEW, {}))
        except Denied:
            return False
        return True

    def _add(self, view: VmView) -> None:
        vm = VmObject(view, self._domain)
        self._registrations[view.name] = Registration(
            self._con, vm.path, vm, [self._interfaces[VM_INTERFACE]], self._gate
        )
        self._vms[view.name] = vm

    def _remove(self, name: str) -> None:
        vm = self._vms.pop(name, None)
        if vm is not None:
            self._registrations.pop(name).close()
            self._root.InterfacesRemoved(vm.path, [VM_INTERFACE])


def connect(address: str | None = None) -> Gio.DBusConnection:
    """A connection to the system bus, or to the one at `address`. Losing it does not end the process."""
    con = (pydbus.connect(address) if address else pydbus.SystemBus()).con
    con.set_exit_on_close(False)
    return con


def serve(
    con: Gio.DBusConnection,
    domain: Domain,
    authority: Authority,
    *,
    version: str = "0",
    on_closed: Callable[[], None] | None = None,
) -> Service:
    """Put the objects on the bus, then take the name. Failed if somebody else has it. Blocks for one round
    trip.

    `on_closed` is called when the connection is lost: it never comes back, so the program should start
    again.
    """
    if on_closed is not None:
        con.connect("closed", loop.once(lambda *_: on_closed()))
    service = Service(con, domain, authority, version)
    owned = _ask_bus(con, "RequestName", GLib.Variant("(su)", (names.SERVICE, _DO_NOT_QUEUE)))
    if owned not in (_PRIMARY_OWNER, _ALREADY_OWNER):
        service.close()
        raise Failed(f"the name {names.SERVICE} is taken on this bus")
    return service


async def _start(domain: Domain, name: str, options: dict[str, Any]) -> None:
    wait = requests.parse_options(options, requests.START_OPTIONS).get("wait", True)
    await domain.start(name, wait=wait)


def _ask_bus(con: Gio.DBusConnection, method: str, args: GLib.Variant) -> int:
    bus, path = "org.freedesktop.DBus", "/org/freedesktop/DBus"
    try:
        reply = con.call_sync(bus, path, bus, method, args, None, Gio.DBusCallFlags.NONE, 10_000, None)
    except GLib.Error as error:
        raise Failed(f"the bus refuses {method}: {error.message}") from error
    return int(reply.unpack()[0])
