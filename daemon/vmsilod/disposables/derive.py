"""What a disposable is, made of its template: the same machine without anything that only one VM can have.

Pure but for the choice of free networks. Called once for each disposable, before anything is acquired. It
gives no more than the template has: the same `allow`, the same name servers, the same way to the internet;
whatever is left out is told in a line for people.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsilod.config.network import InterfaceOptions, NetworkOptions, TapOptions, V4Route, V6Route
from vmsilod.config.schema import RestartPolicy
from vmsilod.errors import BadRequest

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

    from vmsilod.config.model import VmConfig
    from vmsilod.disposables.places import Here
    from vmsilod.disposables.subnets import Subnets


@dataclass(frozen=True)
class Derived:
    """`notes`: what the template has and this does not, each a fact in one line."""

    config: VmConfig
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wish:
    """`network` False: without any interface. `here`: a directory, of which the uid `owner` is to look the
    same inside as outside.
    """

    name: str
    network: bool = True
    here: Here | None = None
    owner: int = 0


def derive(template: VmConfig, wish: Wish, subnets: Subnets) -> Derived:
    """BadRequest where there can be no second VM of the template."""
    here, owner = wish.here, wish.owner
    if template.root_disk is not None and not template.root_disk_readonly:
        raise BadRequest(
            f"'{template.name}' writes to its own root disk, so there can be no disposable of it",
            "set root_disk_readonly = true, or name another template",
        )
    notes: list[str] = []
    for key, what in (
        ("pci_devices", "its PCI devices"),
        ("usb_devices", "its USB devices"),
        ("vhost_user", "its vhost-user devices"),
        ("shared_directories", "its shared directories"),
    ):
        if getattr(template, key):
            notes.append(f"without {what}, which only '{template.name}' itself has")
    readable = tuple(disk for disk in template.additional_disks if disk.ro)
    if len(readable) < len(template.additional_disks):
        notes.append(f"without the disks that '{template.name}' writes to")
    changes = {
        "name": wish.name,
        "template": template.name,
        "disposable": True,
        "network": derive_network(template, subnets, notes) if wish.network else NetworkOptions(),
        "auto_start": False,
        "restart": RestartPolicy(),
        "pci_devices": (),
        "usb": False,
        "usb_devices": (),
        "vhost_user": (),
        "additional_disks": readable,
        "persist": (),
        "shared_home": False,
        "shared_directories": () if here is None else (here.share,),
        "shared_inode": None if here is None else here.inode,
        "guest_id": None if here is None else owner,
        # Three keys of its own take longer to make than the rest of it, and nobody logs in twice.
        "ssh": False,
    }
    return Derived(template.model_copy(update=changes), tuple(notes))


def derive_network(template: VmConfig, subnets: Subnets, notes: list[str]) -> NetworkOptions:
    network = template.network
    if network.forward_ports:
        notes.append(f"without the forwarded ports of '{template.name}'")
    interfaces = {}
    for name, interface in network.interfaces.items():
        if interface.host_addresses:
            interfaces[name] = _derive_routed(name, interface, network.nameservers, subnets, notes)
            continue
        shared = bool(interface.tap.bridge) or interface.type == "macvtap"
        if not shared or (interface.all_addresses and not interface.dhcp):
            notes.append(f"without the interface {name}: no address of its own can be made up for it")
            continue
        interfaces[name] = _derive_shared(interface)
    return network.model_copy(update={"interfaces": interfaces, "forward_ports": ()})


def _derive_routed(
    name: str,
    interface: InterfaceOptions,
    nameservers: tuple[str, ...],
    subnets: Subnets,
    notes: list[str],
) -> InterfaceOptions:
    """A small network between host and guest in place of the template's, with the same ways out."""
    old_v4 = interface.tap.host_address and ipaddress.IPv4Interface(interface.tap.host_address)
    old_v6 = interface.tap.host_address_v6 and ipaddress.IPv6Interface(interface.tap.host_address_v6)
    tap: dict[str, str] = {}
    addresses: tuple[str, ...] = ()
    v6_addresses: tuple[str, ...] = ()
    routes: dict[str, V4Route] = {}
    v6_routes: dict[str, V6Route] = {}
    stray: list[str] = []
    if old_v4:
        net = subnets.take_v4()
        tap["host_address"] = f"{net[1]}/{net.prefixlen}"
        addresses = (f"{net[2]}/{net.prefixlen}",)
        for destination, route in interface.routes.items():
            if ipaddress.IPv4Address(route.via) == old_v4.ip:
                routes[destination] = V4Route(via=str(net[1]))
            else:
                stray.append(destination)
        # A name server at the host's end of the template's link is not on this one's.
        for server in _find_at(nameservers, old_v4.ip):
            routes[f"{server}/32"] = V4Route(via=str(net[1]))
    if old_v6:
        net6 = subnets.take_v6()
        tap["host_address_v6"] = f"{net6[1]}/{net6.prefixlen}"
        v6_addresses = (f"{net6[2]}/{net6.prefixlen}",)
        for destination, route6 in interface.v6_routes.items():
            via = ipaddress.IPv6Address(route6.via)
            if via == old_v6.ip or via.is_link_local:
                v6_routes[destination] = V6Route(via=str(net6[1]))
            else:
                stray.append(destination)
        for server in _find_at(nameservers, old_v6.ip):
            v6_routes[f"{server}/128"] = V6Route(via=str(net6[1]))
    if stray:
        notes.append(f"without the routes of {name} to {', '.join(stray)}: their gateway is not the host")
    return InterfaceOptions(
        tap=TapOptions(**tap),
        addresses=addresses,
        v6_addresses=v6_addresses,
        routes=routes,
        v6_routes=v6_routes,
    )


def _find_at(nameservers: tuple[str, ...], host: IPv4Address | IPv6Address) -> list[str]:
    return [server for server in nameservers if ipaddress.ip_address(server) == host]


def _derive_shared(interface: InterfaceOptions) -> InterfaceOptions:
    """On a bridge or a link of the host: the same, with a MAC address (and a TAP's name) of its own."""
    return interface.model_copy(
        update={
            "mac_address": None,
            "tap": TapOptions(bridge=interface.tap.bridge),
            "addresses": (),
            "v6_addresses": (),
            "v6_routes": {},
            "routes": interface.routes if interface.dhcp else {},
        }
    )
