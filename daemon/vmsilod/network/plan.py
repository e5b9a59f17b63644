"""What the network of all configured VMs is to be: one NetworkPlan, made of the configuration alone.

Pure. Made by `planning.py`; read by the ruleset, the pool, the switch and the guest's files. Two equal plans
mean that nothing has to be done.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network

Interface = IPv4Interface | IPv6Interface
Network = IPv4Network | IPv6Network


@dataclass(frozen=True)
class Allow:
    """Where a VM may connect to, beside what is open to it anyway. `protocol` "" for any, and then no ports;
    `ports` (first, last), None for all.
    """

    network: Network
    protocol: str = ""
    ports: tuple[int, int] | None = None


@dataclass(frozen=True)
class Route:
    destination: Network
    via: str


@dataclass(frozen=True)
class Port:
    """One network interface of a VM: a TAP on the host, `interface` in the guest.

    `tap` is at most 15 bytes; `mac` is the guest's, lower case with colons. Exactly one of these holds:
    `host_addresses` (routed by the host), `bridge` (an existing bridge of the host), `network` (a VM-to-VM
    network, in a network namespace of its own), `link` (an interface of the host that a macvtap is on; `tap`
    is its name), none of them (a TAP that is only filtered).
    `offload`: frames have the virtio header, by which guests leave checksums and the cutting of segments to
    the kernel. What the kernel then writes into a frame it writes after the rules have judged it, so only a
    VMM that insists has it.
    `addresses` are the guest's own; with `dhcp` it asks for more. `served` are other networks behind this VM
    (vm_network.routes).
    """

    vm: str
    interface: str
    tap: str
    mac: str
    queues: int = 1
    offload: bool = False
    host_addresses: tuple[Interface, ...] = ()
    bridge: str = ""
    network: str = ""
    link: str = ""
    addresses: tuple[Interface, ...] = ()
    routes: tuple[Route, ...] = ()
    nameservers: tuple[str, ...] = ()
    dhcp: bool = False
    receive_broadcast: bool = False
    served: tuple[Network, ...] = ()
    allow: tuple[Allow, ...] = ()


@dataclass(frozen=True)
class NetworkPlan:
    """`nat_interface`: VMs with host_addresses reach the internet through it, masqueraded; "" for no NAT.
    `withheld`: VMs whose ports are not in the plan, and why: they cannot be started for now.
    """

    ports: tuple[Port, ...] = field(default=())
    nat_interface: str = ""
    withheld: tuple[tuple[str, str], ...] = ()

    def ports_of(self, vm: str) -> tuple[Port, ...]:
        """In the order of the guest's configuration."""
        return tuple(port for port in self.ports if port.vm == vm)
