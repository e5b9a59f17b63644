"""What an interface of a VM takes for itself, and which two of them take the same.

Pure. Used by `network_checks.py` on all that is configured, and by the planning on what is configured and
what runs. A claim holds within its domain: the host and everything that the host routes, one bridge, one
VM-to-VM network, one link of macvtaps, or the guest itself.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vmsilod.network.names import derive_mac, derive_tap

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vmsilod.config.network import InterfaceOptions, NetworkOptions
    from vmsilod.network.plan import Network

_HOST = "host"


@dataclass(frozen=True)
class Claim:
    """`key` is where the files say so, from "network" on. `value` is a MAC address, a device's name, or a
    network (of one address for "address").
    """

    vm: str
    interface: str
    key: tuple[str, ...]
    kind: Literal["address", "subnet", "mac", "tap", "served"]
    domain: str
    value: str | Network

    @property
    def text(self) -> str:
        if not isinstance(self.value, str) and self.kind == "address":
            return str(self.value.network_address)
        return str(self.value)


_KINDS = {
    "address": "the address",
    "subnet": "the subnet",
    "mac": "the MAC address",
    "tap": "the TAP name",
    "served": "the network",
}


def describe(claim: Claim) -> str:
    return f"{_KINDS[claim.kind]} {claim.text}"


def claims_of(vm: str, network: NetworkOptions) -> list[Claim]:
    claims: list[Claim] = []
    for index, (name, interface) in enumerate(network.interfaces.items()):
        claims += _claims_of_interface(vm, name, index, interface)
    return claims


def _claims_of_interface(vm: str, name: str, index: int, interface: InterfaceOptions) -> Iterator[Claim]:
    place = ("network", "interfaces", name)
    guest, shared = f"VM {vm}", _find_shared_domain(interface)
    tap_key = (*place, "tap", "name") if interface.tap.name else place
    yield Claim(vm, name, tap_key, "tap", _HOST, interface.tap.name or derive_tap(vm, index))
    mac_key = (*place, "mac_address") if interface.mac_address else place
    mac = interface.mac_address or derive_mac(vm, name)
    for domain in (guest, shared) if shared else (guest,):
        yield Claim(vm, name, mac_key, "mac", domain, mac)
    for key, texts in (("addresses", interface.addresses), ("v6_addresses", interface.v6_addresses)):
        for text in texts:
            address = ipaddress.ip_network(ipaddress.ip_interface(text).ip)
            for domain in (guest, _find_address_domain(interface)):
                yield Claim(vm, name, (*place, key), "address", domain, address)
    tap = interface.tap
    for key, host in (("host_address", tap.host_address), ("host_address_v6", tap.host_address_v6)):
        if host is not None:
            subnet = ipaddress.ip_interface(host).network
            yield Claim(vm, name, (*place, "tap", key), "subnet", _HOST, subnet)
    for text in interface.vm_network.routes:
        served = ipaddress.ip_network(text)
        yield Claim(vm, name, (*place, "vm_network", "routes"), "served", shared, served)


def _find_shared_domain(interface: InterfaceOptions) -> str:
    """The link on which other VMs can see this one's frames; "" for a TAP that ends at the host."""
    if interface.tap.bridge:
        return f"bridge {interface.tap.bridge}"
    if interface.type == "vm-switch":
        return f"network {interface.vm_network.name}"
    if interface.type == "macvtap":
        return f"link {interface.macvtap.link}"
    return ""


def _find_address_domain(interface: InterfaceOptions) -> str:
    """A bridge is the host's too: a VM's address is dropped wherever else on the host it comes from."""
    return _HOST if interface.type == "tap" else _find_shared_domain(interface)


def find_conflicts(claims: Iterable[Claim]) -> list[tuple[Claim, Claim]]:
    """Pairs that cannot both be; of many that take the same, each with the first one. Not more than O(n log
    n), since a host may have hundreds.
    """
    listed = list(claims)
    seen: dict[tuple[str, str, str | Network], Claim] = {}
    pairs = []
    for claim in listed:
        if claim.kind == "subnet":
            continue
        first = seen.setdefault((claim.kind, claim.domain, claim.value), claim)
        # One VM's own interfaces are compared in the guest's domain, as there they need not share a link.
        twin = first.vm == claim.vm and claim.kind in ("mac", "address") and not _is_guest(claim)
        if first is not claim and not twin:
            pairs.append((first, claim))
    return pairs + _find_overlaps(listed)


def _is_guest(claim: Claim) -> bool:
    return claim.domain == f"VM {claim.vm}"


def _find_overlaps(claims: list[Claim]) -> list[tuple[Claim, Claim]]:
    """Subnets of the host with one another, and with addresses of VMs on interfaces that have no subnet of
    the host: that those of the others are in it, the models have seen to.
    """
    routed = {(claim.vm, claim.interface) for claim in claims if claim.kind == "subnet"}
    found: list[tuple[tuple[int, int, int], Network, Claim]] = []
    for claim in claims:
        net = claim.value
        if isinstance(net, str) or claim.domain != _HOST:
            continue
        if claim.kind == "subnet" or (claim.vm, claim.interface) not in routed:
            found.append(((net.version, int(net.network_address), net.prefixlen), net, claim))
    found.sort(key=lambda entry: entry[0])
    pairs = []
    widest: tuple[Network, Claim] | None = None  # two networks overlap only if one is in the other
    for _, network, claim in found:
        if widest is not None and _is_inside(network, widest[0]):
            pairs.append((widest[1], claim))
        elif claim.kind == "subnet":
            widest = (network, claim)
    return pairs


def _is_inside(network: Network, other: Network) -> bool:
    """Of two of which `other` begins first."""
    return network.version == other.version and int(network.network_address) <= int(other.broadcast_address)
