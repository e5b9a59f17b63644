"""What the guest is told of its network: files for systemd-networkd and systemd-resolved, and kernel
parameters.

Pure; called at a VM's start. The files travel in the initrd, behind the secret (`vmsilo_image.cpio`), and
the guest's init puts them into /run/systemd before anything reads them. A hostile guest may ignore them:
what it may send is decided by the host's rules, which are made from the same ports.
"""

from __future__ import annotations

from ipaddress import IPv6Interface, ip_address
from typing import TYPE_CHECKING

from vmsilod.network.names import derive_link_local

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmsilod.network.plan import Interface, Port, Route

ROUTER = "networkd.conf.d/10-vmsilo.conf"
RESOLVED = "resolved.conf.d/10-vmsilo.conf"
DHCP_METRIC = 1024  # networkd's own for the first interface; two default routes need two metrics

Lines = list[str]


def plan_ifnames(ports: Sequence[Port]) -> tuple[tuple[str, str], ...]:
    """(interface, MAC) of each, for the kernel parameter vmsilo.ifname."""
    return tuple((port.interface, port.mac) for port in ports)


def plan_guest_files(ports: Sequence[Port]) -> dict[str, str]:
    """Path below /run/systemd -> text; nothing for a VM without interfaces."""
    files: dict[str, str] = {}
    nameservers = tuple(dict.fromkeys(str(ip_address(n)) for port in ports for n in port.nameservers))
    for index, port in enumerate(ports):
        files[f"network/10-vmsilo-{port.interface}.link"] = _join(
            ["[Match]", f"PermanentMACAddress={port.mac}"], ["[Link]", f"Name={port.interface}"]
        )
        files[f"network/10-vmsilo-{port.interface}.network"] = _join(
            ["[Match]", f"PermanentMACAddress={port.mac}"],
            ["[Link]", f"RequiredForOnline={_online_state(port)}"],
            _plan_network(port),
            *([_plan_dhcp(index, use_dns=not nameservers)] if port.dhcp else []),
            *_plan_addresses(port),
            *(_plan_route(route, port) for route in port.routes),
        )
    if any(port.served for port in ports):
        files[ROUTER] = _join(["[Network]", "IPv4Forwarding=yes", "IPv6Forwarding=yes"])
    if nameservers or any(port.dhcp for port in ports):
        files[RESOLVED] = _join(_plan_resolver(nameservers))
    return files


def _online_state(port: Port) -> str:
    """What has to be there before the guest may say that it is ready (networkctl(1), operational states)."""
    if port.dhcp or any(not address.ip.is_link_local for address in port.addresses):
        return "routable"
    return "degraded" if port.addresses else "carrier"


def _plan_network(port: Port) -> Lines:
    return [
        "[Network]",
        f"DHCP={'ipv4' if port.dhcp else 'no'}",
        # Without v6 addresses this switches IPv6 off on the interface; with them the address below is there.
        "LinkLocalAddressing=no",
        "IPv6AcceptRA=no",
        "LLDP=no",
        "LLMNR=no",
        "MulticastDNS=no",
    ]


def _plan_dhcp(index: int, *, use_dns: bool) -> Lines:
    return [
        "[DHCPv4]",
        # The machine ID, of which the default is made, is a new one at each boot.
        "ClientIdentifier=mac",
        "SendHostname=no",
        "UseHostname=no",
        "UseNTP=no",
        f"UseDNS={'yes' if use_dns else 'no'}",
        f"RouteMetric={DHCP_METRIC + index}",
    ]


def _plan_addresses(port: Port) -> Iterator[Lines]:
    addresses: tuple[Interface, ...] = port.addresses
    v6 = [address.ip for address in addresses if address.version == 6]
    if v6 and not any(address.is_link_local for address in v6):
        addresses = (*addresses, IPv6Interface(f"{derive_link_local(port.mac)}/64"))
    # Detection takes a second or two, in which the address cannot be used. Where every neighbour is a VM or
    # the host, whose addresses vmsilo has compared and the rules hold them to, there is nothing to detect.
    detects = not (port.host_addresses or port.network)
    for address in addresses:
        lines = ["[Address]", f"Address={address}"]
        if address.version == 6 and not detects:
            lines.append("DuplicateAddressDetection=none")
        yield lines


def _plan_route(route: Route, port: Port) -> Lines:
    lines = ["[Route]", f"Destination={route.destination}"]
    if not route.via:
        return lines
    gateway = ip_address(route.via)
    lines.append(f"Gateway={gateway}")
    near = gateway.is_link_local or any(gateway in address.network for address in port.addresses)
    if not near and not (port.dhcp and gateway.version == 4):
        lines.append("GatewayOnLink=yes")  # such as the other peers of an interface with a /32
    return lines


def _plan_resolver(nameservers: Sequence[str]) -> Lines:
    # Names go to the configured servers, or those that DHCP names, and to nobody else.
    return ["[Resolve]", f"DNS={' '.join(nameservers)}", "FallbackDNS=", "LLMNR=no", "MulticastDNS=no"]


def _join(*sections: Lines) -> str:
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"
