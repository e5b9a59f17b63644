"""The tables of a VM's network: [network], its interfaces, what they allow; and the host's NAT.

Part of the models of `schema.py`. Like these it never looks at the machine, and it knows one VM only: what
two VMs cannot both have is the question of `network_checks.py`.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from vmsilod.config import addresses
from vmsilod.config.forward_ports import ForwardPorts
from vmsilod.config.table import Table

if TYPE_CHECKING:
    from vmsilod.network.plan import Interface

INTERFACES_MAX = 8
"""Each takes up to 47 bytes of the kernel command line, of whose 2048 vmsilo's own share is 548."""

_NETWORK_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")

InterfaceType = Literal["tap", "vm-switch", "macvtap"]
Protocol = Literal["tcp", "udp", "icmp"]


def _check_network_name(name: str) -> str:
    if not _NETWORK_NAME.fullmatch(name):
        raise ValueError(
            f"'{name}' is not a name of a network: a lower-case letter, then at most 30 of a-z, 0-9 and '-'"
        )
    return name


def _check_once(values: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"names {', '.join(twice)} more than once")
    return values


InterfaceName = Annotated[str, AfterValidator(addresses.check_interface_name)]
MacAddress = Annotated[str, AfterValidator(addresses.check_mac)]
NetworkName = Annotated[str, AfterValidator(_check_network_name)]
V4Interface = Annotated[str, AfterValidator(addresses.check_v4_interface)]
V6Interface = Annotated[str, AfterValidator(addresses.check_v6_interface)]
V4Network = Annotated[str, AfterValidator(addresses.check_v4_network)]
V6Network = Annotated[str, AfterValidator(addresses.check_v6_network)]
AnyNetwork = Annotated[str, AfterValidator(addresses.check_network)]
Nameserver = Annotated[str, AfterValidator(addresses.check_host_address)]
Once = AfterValidator(_check_once)
NatInterface = Annotated[str, AfterValidator(lambda name: name and addresses.check_interface_name(name))]


class NatOptions(Table):
    """Whether VMs with a TAP of their own reach the internet, and out of which interface of the host."""

    enable: bool = False
    interface: NatInterface = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.enable and not self.interface:
            raise ValueError("enable needs the interface that leads to the internet (interface)")
        return self


class HostNetworkingOptions(Table):
    nat: NatOptions = NatOptions()


class AllowEntry(Table):
    """`port` is "80" or "80-90", None for all."""

    to: AnyNetwork
    port: Annotated[str | None, BeforeValidator(addresses.check_ports)] = None
    protocol: Protocol | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.port and self.protocol is None:
            raise ValueError(f"port {self.port} needs its protocol, tcp or udp")
        if self.port and self.protocol == "icmp":
            raise ValueError("icmp has no ports")
        return self

    @property
    def ports(self) -> tuple[int, int] | None:
        if self.port is None:
            return None
        first, _, last = self.port.partition("-")
        return int(first), int(last or first)


class V4Route(Table):
    via: Annotated[str, AfterValidator(addresses.check_v4_gateway)]


class V6Route(Table):
    via: Annotated[str, AfterValidator(addresses.check_v6_gateway)]


class TapOptions(Table):
    """The host's side of an interface."""

    name: InterfaceName | None = None
    host_address: V4Interface | None = None
    host_address_v6: V6Interface | None = None
    bridge: InterfaceName | None = None


class VmNetworkOptions(Table):
    name: NetworkName | None = None
    receive_broadcast: bool = False
    routes: Annotated[tuple[AnyNetwork, ...], Field(strict=False), Once] = ()


class MacvtapOptions(Table):
    link: InterfaceName | None = None


class InterfaceOptions(Table):
    type: InterfaceType = "tap"
    mac_address: MacAddress | None = None
    tap: TapOptions = TapOptions()
    vm_network: VmNetworkOptions = VmNetworkOptions()
    macvtap: MacvtapOptions = MacvtapOptions()
    dhcp: bool = False
    addresses: Annotated[tuple[V4Interface, ...], Field(strict=False), Once] = ()
    routes: dict[V4Network, V4Route] = Field(default={})
    v6_addresses: Annotated[tuple[V6Interface, ...], Field(strict=False), Once] = ()
    v6_routes: dict[V6Network, V6Route] = Field(default={})

    @property
    def all_addresses(self) -> tuple[Interface, ...]:
        return tuple(ipaddress.ip_interface(text) for text in self.addresses + self.v6_addresses)

    @property
    def host_addresses(self) -> tuple[Interface, ...]:
        texts = (self.tap.host_address, self.tap.host_address_v6)
        return tuple(ipaddress.ip_interface(text) for text in texts if text is not None)

    @property
    def all_routes(self) -> tuple[tuple[str, str], ...]:
        """Destination and gateway."""
        v4 = tuple((destination, route.via) for destination, route in self.routes.items())
        return v4 + tuple((destination, route.via) for destination, route in self.v6_routes.items())

    @model_validator(mode="after")
    def _check(self) -> Self:
        for fault in (self._find_misplaced(), self._find_missing(), self._find_stray_address()):
            if fault:
                raise ValueError(fault)
        return self

    def _find_misplaced(self) -> str:
        """An option of another type of interface."""
        host_side = self.tap.host_address or self.tap.host_address_v6 or self.tap.bridge
        if self.type != "tap" and host_side:
            return f"tap.host_address, tap.host_address_v6 and tap.bridge are not for type '{self.type}'"
        if self.type != "vm-switch" and self.vm_network != VmNetworkOptions():
            return f"vm_network is for type 'vm-switch', this is '{self.type}'"
        if self.type != "macvtap" and self.macvtap != MacvtapOptions():
            return f"macvtap is for type 'macvtap', this is '{self.type}'"
        if self.tap.bridge and self.host_addresses:
            return "tap.host_address and tap.bridge exclude each other"
        if self.type == "vm-switch" and self.dhcp:
            return "dhcp is not for type 'vm-switch': nobody on such a network gives addresses"
        return ""

    def _find_missing(self) -> str:
        if self.type == "vm-switch" and self.vm_network.name is None:
            return "type 'vm-switch' needs vm_network.name"
        if self.type == "vm-switch" and not self.all_addresses:
            return "type 'vm-switch' needs an address: addresses or v6_addresses"
        if self.type == "macvtap" and self.macvtap.link is None:
            return "type 'macvtap' needs macvtap.link, an interface of the host"
        return ""

    def _find_stray_address(self) -> str:
        own = self.all_addresses
        for host in self.host_addresses:
            for address in own:
                if address.version == host.version and address.ip == host.ip:
                    return f"{address.ip} is the host's own address on this interface"
                if address.version == host.version and address.ip not in host.network:
                    return f"{address.ip} is outside the host's subnet {host.network}"
        for host_version in {address.version for address in own} if self.host_addresses else ():
            if host_version not in {host.version for host in self.host_addresses}:
                key = "host_address" if host_version == 4 else "host_address_v6"
                return f"has IPv{host_version} addresses, but the host has none: tap.{key}"
        return self._find_stray_gateway()

    def _find_stray_gateway(self) -> str:
        known = self.all_addresses + self.host_addresses
        for destination, via in self.all_routes:
            gateway = ipaddress.ip_address(via)
            subnets = [address.network for address in known if address.version == gateway.version]
            if gateway.is_link_local and gateway.version == 6:
                continue
            if not subnets and self.dhcp:
                continue  # the subnet is the DHCP server's to say
            if not any(gateway in subnet for subnet in subnets):
                shown = ", ".join(dict.fromkeys(map(str, subnets))) or f"no IPv{gateway.version} address"
                return f"the gateway {via} of {destination} is outside the subnet ({shown})"
            if any(gateway == address.ip for address in self.all_addresses):
                return f"the gateway {via} of {destination} is the interface's own address"
        return ""


def _check_interfaces(interfaces: dict[str, InterfaceOptions]) -> dict[str, InterfaceOptions]:
    if len(interfaces) > INTERFACES_MAX:
        raise ValueError(f"{len(interfaces)} interfaces, above {INTERFACES_MAX}")
    return interfaces


AllowEntries = Annotated[
    tuple[Annotated[AllowEntry, BeforeValidator(addresses.expand_allow)], ...], Field(strict=False)
]


class NetworkOptions(Table):
    """Without interfaces the VM is offline. The order of the interfaces is that of the file."""

    nameservers: Annotated[tuple[Nameserver, ...], Field(strict=False), Once] = ()
    allow: AllowEntries = ()
    interfaces: Annotated[dict[InterfaceName, InterfaceOptions], AfterValidator(_check_interfaces)] = Field(
        default={}
    )
    forward_ports: ForwardPorts = ()

    def dump_for_guest(self) -> dict[str, Any]:
        """What of it a running VM is made of, as JSON takes it. The rules of the host (`allow`) are not; the
        order of the interfaces is.
        """
        content = self.model_dump(mode="json", exclude={"allow"})
        return content | {"interfaces": list(content["interfaces"].items())}
