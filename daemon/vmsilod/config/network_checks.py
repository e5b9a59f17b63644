"""Checks of the network that need more than one VM, or this machine.

Called by the loader after the models; returns problems and warnings and changes nothing. Of two VMs that
take the same both are told, each with the other's place, and both are disabled: nobody knows which of them
is meant.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmsilod.config.network_claims import Claim, claims_of, describe, find_conflicts
from vmsilod.config.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from vmsilod.config.network import NetworkOptions
    from vmsilod.config.schema import GlobalConfig
    from vmsilod.network.plan import Network

SYS_NET = Path("/sys/class/net")
PROC_NET = Path("/proc/net")
ALIAS = "vmsilo:"
"""How the alias of a device of ours begins."""

_HINTS = {
    "address": "give each interface an address of its own",
    "subnet": "give each interface a subnet of its own",
    "mac": "set another mac_address for one of them",
    "tap": "set another tap.name for one of them",
    "served": "leave it to one VM of the network",
}


@dataclass(frozen=True)
class NetworkFile:
    """The network of one VM, and in which file a key of it is ("network", ...)."""

    vm: str
    network: NetworkOptions
    find_origin: Callable[[tuple[str, ...]], str]


def check_conflicts(files: Mapping[str, NetworkFile]) -> list[Problem]:
    claims = [claim for name, file in files.items() for claim in claims_of(name, file.network)]
    problems: dict[Problem, None] = {}
    for first, second in find_conflicts(claims):
        for claim, other in ((first, second), (second, first)):
            problems.setdefault(_tell(claim, other, files))
    return list(problems)


def _tell(claim: Claim, other: Claim, files: Mapping[str, NetworkFile]) -> Problem:
    place = f"{files[other.vm].find_origin(other.key)}: {'.'.join(other.key)}"
    whose = f"interface {other.interface}" + ("" if other.vm == claim.vm else f" of {other.vm}")
    if claim.kind != other.kind:
        relation = f"is in the subnet {other.text}" if claim.kind == "address" else f"has {describe(other)}"
        fact = f"{describe(claim)} {relation} of {whose} ({place})"
    elif claim.value == other.value:
        fact = f"{describe(claim)} is also that of {whose} ({place})"
    else:
        fact = f"{describe(claim)} overlaps {other.text} of {whose} ({place})"
    file = files[claim.vm].find_origin(claim.key)
    return Problem(file, ".".join(claim.key), fact, _HINTS[claim.kind], vm=claim.vm)


def check_device_names(
    files: Mapping[str, NetworkFile], settings: GlobalConfig | None, global_file: str
) -> list[Problem]:
    """A TAP must not have the name of a device of the host that the files name themselves."""
    used: dict[str, str] = {}
    if settings is not None and (interface := settings.host_networking.nat.interface):
        used[interface] = f"{global_file}: host_networking.nat.interface"
    for file in files.values():
        for key, device in _find_devices(file.network):
            used.setdefault(device, f"{file.find_origin(key)}: {'.'.join(key)}")
    problems = []
    for name, file in files.items():
        for claim in claims_of(name, file.network):
            if claim.kind == "tap" and claim.text in used:
                fact = f"{describe(claim)} is that of another device of the host ({used[claim.text]})"
                place = file.find_origin(claim.key)
                problems.append(Problem(place, ".".join(claim.key), fact, "set another tap.name", vm=name))
    return problems


def _find_devices(network: NetworkOptions) -> Iterator[tuple[tuple[str, ...], str]]:
    """Devices of the host that are to be there: the key and the name."""
    for name, interface in network.interfaces.items():
        if interface.tap.bridge:
            yield ("network", "interfaces", name, "tap", "bridge"), interface.tap.bridge
        if interface.macvtap.link:
            yield ("network", "interfaces", name, "macvtap", "link"), interface.macvtap.link


def find_absent(file: NetworkFile, sys_net: Path = SYS_NET) -> set[str]:
    """Devices of the host that the file names and that are not there yet."""
    return {device for _, device in _find_devices(file.network) if not (sys_net / device).exists()}


def check_devices(file: NetworkFile, sys_net: Path = SYS_NET) -> list[Problem]:
    """Asks the machine: a bridge or a macvtap's link that is not there (or is not one)."""
    problems = []
    for key, device in _find_devices(file.network):
        fact = ""
        if not (sys_net / device).exists():
            fact = f"this machine has no network interface '{device}'"
        elif key[-1] == "bridge" and not (sys_net / device / "bridge").exists():
            fact = f"'{device}' is not a bridge"
        if fact:
            hint = "the VM can be started as soon as it is there" if "no network" in fact else ""
            problems.append(Problem(file.find_origin(key), ".".join(key), fact, hint, vm=file.vm))
    return problems


def find_stray_gateways(file: NetworkFile) -> list[Problem]:
    """A TAP that the host routes has two ends only; another gateway than the host answers to nobody."""
    warnings = []
    for name, interface in file.network.interfaces.items():
        hosts = [address.ip for address in interface.host_addresses]
        for version, key in ((4, "routes"), (6, "v6_routes")):
            known = [host for host in hosts if host.version == version]
            place = ("network", "interfaces", name, key)
            for destination, via in interface.all_routes:
                gateway = ipaddress.ip_address(via)
                if gateway.version != version or not known or gateway in known or gateway.is_link_local:
                    continue
                fact = f"nobody answers as the gateway {via} of {destination}"
                hint = f"the host's address on this interface is {known[0]}"
                warnings.append(Problem(file.find_origin(place), ".".join(place), fact, hint))
    return warnings


def find_missing_nat(settings: GlobalConfig, file: str, sys_net: Path = SYS_NET) -> list[Problem]:
    """Asks the machine. No problem, as the interface may come later: then the rules hold for it as well."""
    nat = settings.host_networking.nat
    if not nat.enable or (sys_net / nat.interface).exists():
        return []
    fact = f"this machine has no network interface '{nat.interface}' now"
    hint = "no VM reaches the internet until there is one"
    return [Problem(file, "host_networking.nat.interface", fact, hint)]


def find_host_overlaps(
    files: Mapping[str, NetworkFile], proc_net: Path = PROC_NET, sys_net: Path = SYS_NET
) -> list[Problem]:
    """Asks the machine: subnets of TAPs that another interface of the host is in. A warning only, since a
    laptop comes to other networks every day.
    """
    taken = [
        (network, device) for network, device in find_host_routes(proc_net) if not _is_ours(device, sys_net)
    ]
    warnings = []
    for name, file in files.items():
        for claim in claims_of(name, file.network):
            for network, device in taken if claim.kind == "subnet" else ():
                if isinstance(claim.value, str) or not _overlap(claim.value, network):
                    continue
                fact = f"{describe(claim)} overlaps {network}, which the host reaches by {device}"
                hint = "one of the two cannot be reached while the VM has it"
                warnings.append(Problem(file.find_origin(claim.key), ".".join(claim.key), fact, hint))
    return warnings


def _overlap(one: Network, other: Network) -> bool:
    if isinstance(one, ipaddress.IPv4Network):
        return isinstance(other, ipaddress.IPv4Network) and one.overlaps(other)
    return isinstance(other, ipaddress.IPv6Network) and one.overlaps(other)


def find_host_routes(proc_net: Path = PROC_NET) -> Iterator[tuple[Network, str]]:
    """Networks that are on a link of the host: no default routes, nothing by way of a gateway."""
    for line in _read_lines(proc_net / "route")[1:]:
        device, destination, gateway, *rest = line.split()
        mask = int.from_bytes(bytes.fromhex(rest[4]), "little")
        address = int.from_bytes(bytes.fromhex(destination), "little")
        if mask and not int(gateway, 16):
            yield ipaddress.IPv4Network((address, mask.bit_count())), device
    for line in _read_lines(proc_net / "ipv6_route"):
        destination, length, _, _, gateway, *_, device = line.split()
        network = ipaddress.IPv6Network((int(destination, 16), int(length, 16)))
        single = network.prefixlen in (0, 128) or network.is_link_local or network.is_multicast
        if not single and not int(gateway, 16):
            yield network, device


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []  # no IPv6 in this kernel


def _is_ours(device: str, sys_net: Path) -> bool:
    try:
        return device == "lo" or (sys_net / device / "ifalias").read_text().startswith(ALIAS)
    except OSError:
        return False
