"""Pieces of nftables' language: names, sets, maps and what a VM's `allow` says, as text.

Pure; used by `frame_rules.py` and `ruleset.py` alone. Nothing gets into a text that was not checked or made
here of numbers: a name that could mean something else to nft (`tap*` stands for all that begin so) is an
error.
"""

from __future__ import annotations

import re
from ipaddress import collapse_addresses, ip_network
from typing import TYPE_CHECKING

from vmsilod.errors import Failed
from vmsilod.network.plan import Allow

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from ipaddress import IPv4Network, IPv6Network

    from vmsilod.network.plan import Network, Port

SIZE = 65535
"""Of the sets that rules fill: more than there can be TAPs."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,31}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_PROTOCOLS = ("tcp", "udp", "icmp")


def checked(name: str) -> str:
    """A name of an interface, a bridge or a VM, as it may stand in a text."""
    if not _NAME.fullmatch(name):
        raise Failed(
            f"{name!r} cannot be in a firewall rule", "names have letters, digits, '-', '_' and '.'"
        )
    return name


def quoted(name: str) -> str:
    return f'"{checked(name)}"'


def checked_mac(mac: str) -> str:
    if not _MAC.fullmatch(mac):
        raise Failed(f"{mac!r} is not a MAC address")
    return mac


def render_set(name: str, kind: str, elements: Iterable[str], *, flags: str = "") -> str:
    """`kind` with its keyword: "type ifname", "typeof iifname . @th,208,48"."""
    return _render_named("set", name, kind, elements, flags)


def render_map(name: str, kind: str, elements: Mapping[str, str], *, flags: str = "") -> str:
    return _render_named("map", name, kind, (f"{key} : {value}" for key, value in elements.items()), flags)


def _render_named(what: str, name: str, kind: str, elements: Iterable[str], flags: str) -> str:
    listed = ", ".join(dict.fromkeys(elements))
    return (
        f"\t{what} {name} {{\n\t\t{kind}\n"
        + (f"\t\t{flags}\n" if flags else "")
        + (f"\t\telements = {{ {listed} }}\n" if listed else "")
        + "\t}\n"
    )


def render_networks(name: str, version: int, networks: Iterable[Network]) -> str:
    return render_set(name, f"type ipv{version}_addr", collapsed(networks, version), flags="flags interval")


def collapsed(networks: Iterable[Network], version: int) -> tuple[str, ...]:
    """Without overlaps, which nft refuses in one set; sorted."""
    if version == 4:
        return tuple(str(network) for network in collapse_addresses(_of_version_4(networks)))
    return tuple(str(network) for network in collapse_addresses(_of_version_6(networks)))


def _of_version_4(networks: Iterable[Network]) -> Iterable[IPv4Network]:
    return (network for network in networks if network.version == 4)


def _of_version_6(networks: Iterable[Network]) -> Iterable[IPv6Network]:
    return (network for network in networks if network.version == 6)


def render_chain(name: str, rules: Iterable[str]) -> str:
    return f"\tchain {name} {{\n" + "".join(f"\t\t{rule}\n" for rule in rules) + "\t}\n"


def allow_rules(allows: Iterable[Allow]) -> list[str]:
    """One rule for all that is open whole, one for each of the others."""
    allows = tuple(dict.fromkeys(allows))
    whole = [allow.network for allow in allows if not allow.protocol and allow.ports is None]
    rules = []
    for version, word in ((4, "ip"), (6, "ip6")):
        if networks := collapsed(whole, version):
            rules.append(f"{word} daddr {{ {', '.join(networks)} }} accept")
    return rules + [_allow_rule(allow) for allow in allows if allow.protocol or allow.ports is not None]


def _allow_rule(allow: Allow) -> str:
    if allow.protocol not in _PROTOCOLS or (allow.ports and allow.protocol == "icmp"):
        raise Failed(f"a firewall rule cannot be made of {allow}")
    icmp = "icmp" if allow.network.version == 4 else "ipv6-icmp"
    protocol = icmp if allow.protocol == "icmp" else allow.protocol
    destination = f"{'ip' if allow.network.version == 4 else 'ip6'} daddr {allow.network}"
    if allow.ports is None:
        return f"{destination} meta l4proto {protocol} accept"
    first, last = allow.ports
    ports = str(first) if first == last else f"{first}-{last}"
    return f"{destination} {protocol} dport {ports} accept"


def nameserver_allows(port: Port) -> tuple[Allow, ...]:
    """DNS over UDP and TCP to the port's own nameservers."""
    return tuple(
        Allow(ip_network(server), protocol, (53, 53))
        for server in port.nameservers
        for protocol in ("udp", "tcp")
    )


def host_allows(port: Port) -> tuple[Allow, ...]:
    """What opens the host itself: a network that is open does not, even if the host is in it; a single
    address does.
    """
    return tuple(allow for allow in port.allow if allow.network.num_addresses == 1) + nameserver_allows(port)


def open_allows(port: Port) -> tuple[Allow, ...]:
    return port.allow + nameserver_allows(port)


def host_and_group_allows(port: Port) -> tuple[Allow, ...]:
    """The host takes part in groups too: a network that is nothing but groups opens those."""
    return tuple(
        allow
        for allow in open_allows(port)
        if allow.network.num_addresses == 1 or allow.network.is_multicast
    )
