"""Makes the NetworkPlan of the configuration: every VM's interfaces with their TAPs, addresses and rules.

Pure. Called after each load of the configuration and after each start and stop of a VM. What two VMs cannot
both have was refused by `config/network_checks.py`; what remains is a VM that still runs with what the files
now give to another one.
"""

from __future__ import annotations

import ipaddress
from types import MappingProxyType
from typing import TYPE_CHECKING

from vmsilod.config.network_claims import claims_of, describe, find_conflicts
from vmsilod.network.names import derive_mac, derive_tap
from vmsilod.network.plan import Allow, NetworkPlan, Port, Route

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmsilod.config.model import VmConfig
    from vmsilod.config.network import InterfaceOptions
    from vmsilod.config.schema import GlobalConfig
    from vmsilod.network.plan import Network

QUEUES_MAX = 4
_NONE: Mapping[str, VmConfig] = MappingProxyType({})


def plan_network(
    settings: GlobalConfig | None, vms: Mapping[str, VmConfig], running: Mapping[str, VmConfig] = _NONE
) -> NetworkPlan:
    """`vms` are all that are configured, `running` what those that run were started with: they keep it until
    they stop, but for what changes live. A VM that wants what a running one still has is withheld.

    `settings` None, since the global file is broken: no NAT. Whoever has the last good ones gives these.
    """
    effective = {name: running.get(name, vm) for name, vm in vms.items()} | dict(running)
    withheld = _find_withheld(effective, frozenset(running))
    ports = [
        port
        for name, vm in sorted(effective.items())
        if name not in withheld
        for port in _plan_vm(vm, live=vms.get(name, vm))
    ]
    nat = settings.host_networking.nat if settings is not None else None
    return NetworkPlan(
        tuple(ports),
        nat_interface=nat.interface if nat is not None and nat.enable else "",
        withheld=tuple(sorted(withheld.items())),
    )


def _find_withheld(vms: Mapping[str, VmConfig], running: frozenset[str]) -> dict[str, str]:
    """VM -> why. The checks leave no two of which neither runs; of such two the second would be withheld."""
    claims = [claim for name in vms for claim in claims_of(name, vms[name].network)]
    # Of many that take the same each is compared with the first: that is to be one that runs.
    claims.sort(key=lambda claim: (claim.vm not in running, claim.vm))
    withheld: dict[str, str] = {}
    for pair in find_conflicts(claims):
        winner, loser = sorted(pair, key=lambda claim: (claim.vm not in running, claim.vm))
        if loser.vm != winner.vm:
            withheld.setdefault(loser.vm, f"{winner.vm} still runs with {describe(winner)}")
    return withheld


def _plan_vm(vm: VmConfig, live: VmConfig) -> list[Port]:
    """`live` is what the files say now, for what changes while the VM runs."""
    network = vm.network
    interfaces = network.interfaces
    allow = tuple(
        Allow(ipaddress.ip_network(entry.to), entry.protocol or "", entry.ports)
        for entry in live.network.allow
    )
    ports = []
    for index, (name, interface) in enumerate(interfaces.items()):
        ports.append(
            Port(
                vm=vm.name,
                interface=name,
                tap=interface.tap.name or derive_tap(vm.name, index),
                mac=interface.mac_address or derive_mac(vm.name, name),
                queues=count_queues(vm),
                offload=needs_header(vm),
                host_addresses=interface.host_addresses,
                bridge=interface.tap.bridge or "",
                network=interface.vm_network.name or "",
                link=interface.macvtap.link or "",
                addresses=interface.all_addresses,
                routes=tuple(
                    Route(ipaddress.ip_network(destination), via)
                    for destination, via in interface.all_routes
                ),
                nameservers=tuple(s for s in network.nameservers if _has_way(s, name, interfaces)),
                dhcp=interface.dhcp,
                receive_broadcast=interface.vm_network.receive_broadcast,
                served=tuple(ipaddress.ip_network(text) for text in interface.vm_network.routes),
                allow=allow,
            )
        )
    return ports


def count_queues(vm: VmConfig) -> int:
    """One for crosvm, which would open /dev/net/tun for the others itself, and for "auto", which may become
    crosvm: whoever knows what it became gives configurations that say so.
    """
    return min(vm.cpus, QUEUES_MAX) if vm.vmm in ("qemu", "cloud-hypervisor") else 1


def needs_header(vm: VmConfig) -> bool:
    """crosvm and cloud-hypervisor refuse a TAP without the virtio header, QEMU looks what it got. "auto" may
    become crosvm.
    """
    return vm.vmm != "qemu"


def _has_way(nameserver: str, name: str, interfaces: Mapping[str, InterfaceOptions]) -> bool:
    """Whether the guest reaches this name server by this interface: those with the longest matching route
    count; where none has one, every interface that asks by DHCP, and if none does, every one.
    """
    lengths = {each: _find_best_match(nameserver, interface) for each, interface in interfaces.items()}
    best = max(lengths.values())
    if best >= 0:
        return lengths[name] == best
    return interfaces[name].dhcp or not any(interface.dhcp for interface in interfaces.values())


def _find_best_match(nameserver: str, interface: InterfaceOptions) -> int:
    """Bits of the most specific route or subnet that has the address; -1: none."""
    address = ipaddress.ip_address(nameserver)
    known: list[Network] = [own.network for own in interface.all_addresses]
    known += [ipaddress.ip_network(destination) for destination, _ in interface.all_routes]
    return max(
        (net.prefixlen for net in known if net.version == address.version and address in net), default=-1
    )
