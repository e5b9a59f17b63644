"""Single values of the network tables: checked, and brought into the one form that everybody else reads.

Called by the models of `network.py`. Pure. Every function raises ValueError with a
fact about the value; a string stays a string, so that a configuration can be stored as it was.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Any

from vmsilod.network.names import INTERFACE_NAME_MAX

if TYPE_CHECKING:
    from vmsilod.network.plan import Interface, Network

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# The kernel takes more; these are the ones that need no quoting in nft, sysctl and networkd.
_INTERFACE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")
# Directories of /proc/sys/net/ipv4/conf, and the loopback that every machine has.
_RESERVED_INTERFACES = frozenset({"all", "default", "lo"})
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_ALLOW = re.compile(r"(?:\[(?P<v6>[^\]]*)\]|(?P<v4>[^:\[\]]*)):(?P<ports>[^/]*)(?:/(?P<protocol>.*))?")
PORT_MAX = 65535


def check_interface_name(name: str) -> str:
    if not _INTERFACE_NAME.fullmatch(name):
        raise ValueError(
            f"'{name}' is not a name of a network interface: 1 to {INTERFACE_NAME_MAX} of a-z, A-Z, 0-9, "
            "'_', '.' and '-', and no '.' or '-' first"
        )
    if name.isdecimal():
        raise ValueError(f"'{name}' is not a name of a network interface: it has digits only")
    if name in _RESERVED_INTERFACES:
        raise ValueError(f"'{name}' is a name that the kernel uses itself")
    return name


def check_mac(text: str) -> str:
    mac = text.lower().replace("-", ":")
    if not _MAC.fullmatch(mac):
        raise ValueError(f"'{text}' is not a MAC address such as 02:00:00:00:00:01")
    if int(mac[:2], 16) & 1:
        raise ValueError(f"'{text}' is a group's MAC address: the lowest bit of its first byte is set")
    if mac == "00:00:00:00:00:00":
        raise ValueError(f"'{text}' is no interface's MAC address")
    return mac


def _parse_interface(text: str, version: int) -> Interface:
    example = "10.0.0.1/24" if version == 4 else "fd00::1/64"
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError:
        interface = None
    if interface is None or interface.version != version or "%" in text:
        raise ValueError(f"'{text}' is not an IPv{version} address with its prefix, such as {example}")
    if "/" not in text:
        raise ValueError(f"'{text}' lacks its prefix: {text}/{example.partition('/')[2]}, for example")
    _check_host(text, interface.ip)
    if isinstance(interface, ipaddress.IPv4Interface) and interface.network.prefixlen < 31:
        if interface.ip == interface.network.network_address:
            raise ValueError(f"'{text}' is the address of the network itself")
        if interface.ip == interface.network.broadcast_address:
            raise ValueError(f"'{text}' is the broadcast address of its network")
    return interface


def _check_host(text: str, address: Address) -> None:
    """Neither a group's address nor one that never leaves a machine."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        raise ValueError(f"'{text}' is an IPv4 address in IPv6 form")
    for kind, found in (
        ("a multicast address", address.is_multicast),
        ("the unspecified address", address.is_unspecified),
        ("a loopback address", address.is_loopback),
        ("a reserved address", address.version == 4 and address.is_reserved),
    ):
        if found:
            raise ValueError(f"'{text}' is {kind}, which no interface has")
    if isinstance(address, ipaddress.IPv4Address) and int(address) >> 24 == 0:
        raise ValueError(f"'{text}' is an address of 0.0.0.0/8, which no interface has")


def check_v4_interface(text: str) -> str:
    return str(_parse_interface(text, 4))


def check_v6_interface(text: str) -> str:
    interface = _parse_interface(text, 6)
    if interface.ip.is_link_local:
        raise ValueError(f"'{text}' is link-local: such an address comes from the MAC address by itself")
    return str(interface)


def _parse_network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        pass
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"'{text}' is not a network such as 192.168.1.0/24 or fd00::/64") from None
    raise ValueError(f"'{text}' is an address in {network}, not a network")


def check_network(text: str) -> str:
    """IPv4 or IPv6; a bare address is a network of one."""
    if "%" in text:
        raise ValueError(f"'{text}' has a zone, which only means something on one machine")
    return str(_parse_network(text))


def check_v4_network(text: str) -> str:
    return _check_version(check_network(text), 4)


def check_v6_network(text: str) -> str:
    return _check_version(check_network(text), 6)


def _check_version(text: str, version: int) -> str:
    if ipaddress.ip_network(text).version != version:
        raise ValueError(f"'{text}' is not IPv{version}")
    return text


def _parse_address(text: str) -> Address:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"'{text}' is not an IP address") from None
    if "%" in text:
        raise ValueError(f"'{text}' has a zone, which only means something on one machine")
    return address


def check_host_address(text: str) -> str:
    """One machine's address, IPv4 or IPv6."""
    address = _parse_address(text)
    _check_host(text, address)
    return str(address)


def check_v4_gateway(text: str) -> str:
    return _check_gateway(text, 4)


def check_v6_gateway(text: str) -> str:
    return _check_gateway(text, 6)


def _check_gateway(text: str, version: int) -> str:
    address = check_host_address(text)
    if ipaddress.ip_address(address).version != version:
        raise ValueError(f"'{text}' is not IPv{version}")
    return address


def check_ports(value: Any) -> str | None:  # whatever TOML gave
    """ "80" or "80-90"; a number is one port. None, which TOML has not, is all of them."""
    if value is None:
        return None
    match = _PORTS.fullmatch(str(value)) if type(value) in (int, str) else None
    if match is None:
        raise ValueError(f"'{value}' is not a port or a range such as 80-90")
    first, last = int(match[1]), int(match[2] or match[1])
    for port in (first, last):
        if not 1 <= port <= PORT_MAX:
            raise ValueError(f"{port} is not a port: 1 to {PORT_MAX}")
    if last < first:
        raise ValueError(f"'{value}' ends before it begins")
    return str(first) if first == last else f"{first}-{last}"


def expand_allow(value: Any) -> Any:  # whatever TOML gave; pydantic checks the result
    """ "NETWORK" and "NETWORK:PORTS/PROTOCOL" mean the table with these keys; an IPv6 network with ports is
    in brackets.
    """
    if not isinstance(value, str):
        return value
    bare = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    try:
        ipaddress.ip_network(bare, strict=False)
    except ValueError:
        pass
    else:
        return {"to": bare}
    match = _ALLOW.fullmatch(value)
    if match is None:
        raise ValueError(
            f"'{value}' is not a destination such as 192.168.1.0/24, 10.0.0.5:443/tcp or [fd00::5]:443/tcp"
        )
    if not match["protocol"]:
        raise ValueError(f"'{value}' names ports without a protocol: {value.rstrip('/')}/tcp, for example")
    to = match["v6"] if match["v6"] is not None else match["v4"]
    return {"to": to, "port": match["ports"], "protocol": match["protocol"]}
