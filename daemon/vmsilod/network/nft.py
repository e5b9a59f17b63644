"""nft(8): loads vmsilo's rules, tells whether they are there, what they have dropped, and who else filters.

Called in the worker by the pool; every function blocks, a loading with 500 VMs for some tenths of a second.
Text goes in, since nft's own JSON does not load back in every version; JSON comes out. It keeps no state:
what the rules have counted and learned is read back before they are replaced, and put into the new ones.
"""

from __future__ import annotations

import json
import socket
import subprocess
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any

from vmsilod.errors import Failed
from vmsilod.network.frame_rules import LIES
from vmsilod.network.rule_text import quoted
from vmsilod.network.ruleset import (
    COUNTED,
    FAMILIES,
    TABLE,
    Surroundings,
    ports_of,
    render_removal,
    taps_in,
    uses_in,
    version_in,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from ipaddress import IPv4Address, IPv6Address

    from vmsilod.network.plan import Network, NetworkPlan

NFT = "/usr/sbin/nft"
NFT_SECONDS = 60
IFF_NOARP, MAIN_TABLE, RTN_UNICAST = 0x80, 254, 1  # linux/if.h, linux/rtnetlink.h
NFPROTO = {"inet": 1, "netdev": 5}  # linux/netfilter.h
HINT = "vmsilo's firewall needs nft (package nftables) and a kernel with nf_tables"
_NETDEV_COUNTED = ("denied", *(f"lie_{kind}" for kind in LIES))


@dataclass(frozen=True)
class Count:
    packets: int = 0
    bytes: int = 0


def look_around(plan: NetworkPlan) -> Surroundings:
    """The interfaces that exist, and the networks that the host is in by those that are not VMs'."""
    devices = frozenset(name for _, name in socket.if_nameindex())
    from pyroute2 import IPRoute  # late, as in links.py

    taps = {port.tap for port in ports_of(plan)}
    nearby: set[Network] = set()
    host: set[IPv4Address | IPv6Address] = set()
    try:
        with IPRoute() as route:
            names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in route.get_links()}
            for address in route.get_addr():
                if names.get(address["index"]) in {*taps, "lo"}:
                    continue
                network = ip_network((address.get_attr("IFA_ADDRESS"), address["prefixlen"]), strict=False)
                # A network of everybody would be the end of the internet.
                if network.prefixlen > 0:
                    nearby.add(network)
                # Of a peer-to-peer link IFA_ADDRESS is the other end.
                host.add(ip_address(address.get_attr("IFA_LOCAL") or address.get_attr("IFA_ADDRESS")))
            # Where nobody has neighbours (a VPN's device), a route without a gateway is no LAN.
            lans = {
                link["index"]
                for link in route.get_links()
                if not link["flags"] & IFF_NOARP and link.get_attr("IFLA_IFNAME") not in {*taps, "lo"}
            }
            nearby.update(_find_routed(route.get_routes(table=MAIN_TABLE), lans))
    except OSError as error:
        raise Failed(f"the host's networks cannot be read: {error.strerror}") from error
    return Surroundings(tuple(sorted(nearby, key=str)), devices, tuple(sorted(host, key=str)))


def _find_routed(routes: Iterable[Any], devices: Collection[int]) -> Iterator[Network]:
    """Networks that are on the link of one of `devices`, whatever addresses the host has there."""
    for found in routes:
        destination = found.get_attr("RTA_DST")
        if (
            found["type"] == RTN_UNICAST
            and found.get_attr("RTA_TABLE") == MAIN_TABLE
            and found.get_attr("RTA_OIF") in devices
            and not (found.get_attr("RTA_GATEWAY") or found.get_attr("RTA_VIA"))
            and destination is not None
            and found["dst_len"] > 0
        ):
            yield ip_network((destination, found["dst_len"]), strict=False)


def apply(text: str) -> None:
    """Load a rendered ruleset, with what the one that it replaces has counted and learned of TAPs that stay.

    One transaction: until its end, and when it fails, the rules that are loaded hold. Raises Failed.
    """
    _run(["-f", "-"], text + _render_kept(taps_in(text)))


def load(text: str) -> None:
    """A text as it is, in one transaction. Raises Failed."""
    _run(["-f", "-"], text)


def has_chain(family: str, table: str, name: str) -> bool:
    """Raises Failed."""
    return (family, table, name) in _find_chains()


def check(text: str) -> None:
    """Whether nft and this kernel would take it. Raises Failed."""
    _run(["-c", "-f", "-"], text)


def is_installed(text: str) -> bool:
    """Whether exactly this ruleset is loaded, still holds all of its TAPs, and no rule was added to a chain
    or taken from one. Raises Failed.
    """
    chains = _find_chains()
    version = version_in(text)
    return (
        all((family, TABLE, version) in chains for family in FAMILIES)
        and all(("netdev", TABLE, f"in-{tap}") in chains for tap in taps_in(text))
        and _are_filled(text)
    )


def _are_filled(text: str) -> bool:
    """Whether no chain has lost or got a rule. nft would have to read all of them to tell; the kernel tells
    of each chain how much uses it, in one short answer.
    """
    from pyroute2.netlink.exceptions import NetlinkError  # late, as in links.py
    from pyroute2.nftables.main import NFTables

    try:
        with NFTables(nfgen_family=socket.AF_UNSPEC) as tables:
            uses = {
                (int(chain["nfgen_family"]), str(chain.get_attr("NFTA_CHAIN_NAME"))): chain.get_attr(
                    "NFTA_CHAIN_USE"
                )
                for chain in tables.get_chains()
                if chain.get_attr("NFTA_CHAIN_TABLE") == TABLE
            }
    except (OSError, NetlinkError) as error:
        raise Failed("the chains of the rules cannot be read", HINT) from error
    return uses == {(NFPROTO[family], name): count for (family, name), count in uses_in(text).items()}


def has_rules() -> bool:
    """Whether any ruleset of ours is loaded. Raises Failed."""
    chains = _find_chains()
    return all(any(key[:2] == (family, TABLE) for key in chains) for family in FAMILIES)


def remove() -> None:
    """Raises Failed."""
    _run(["-f", "-"], render_removal())


def read_counts() -> dict[str, dict[str, Count]]:
    """What was dropped so far, by interface and kind: "denied" (not open to the VM), "inbound" (for it, and
    not asked for), "elsewhere" (an address of a VM came in by this interface), and the kinds of LIES. No
    entry means none. {} without rules. Raises Failed.
    """
    found: dict[str, dict[str, Count]] = {}
    for family, wanted in (("netdev", _NETDEV_COUNTED), ("inet", COUNTED)):
        for name, elements in _find_sets(family, wanted).items():
            kind = name.removeprefix("lie_")
            for interface, count in _parse_counts(elements):
                kinds = found.setdefault(interface, {})
                before = kinds.get(kind, Count())
                kinds[kind] = Count(before.packets + count.packets, before.bytes + count.bytes)
    return found


def read_counters(table: str, chains: Collection[str]) -> int:
    """The packets that rules with a counter in these chains of a `netdev` table have seen. Raises Failed."""
    return sum(
        expression["counter"]["packets"]
        for rule in _list(["table", "netdev", table]).get("rule", [])
        if rule.get("chain") in chains
        for expression in rule.get("expr", [])
        if "counter" in expression
    )


def find_obstacles() -> tuple[str, ...]:
    """Chains of others that by themselves keep what is forwarded from passing, as "FAMILY TABLE CHAIN":
    vmsilo cannot open what they drop. Raises Failed.
    """
    found = []
    for (family, table, name), chain in _find_chains().items():
        if family not in {"ip", "ip6", "inet"} or table == TABLE or chain.get("hook") != "forward":
            continue
        # firewalld's policy is to accept, but what no zone opens meets a reject at the chain's end.
        if chain.get("policy") == "drop" or table == "firewalld":
            found.append(f"{family} {table} {name}")
    return tuple(found)


def _render_kept(taps: frozenset[str]) -> str:
    """Commands that fill the sets of a new ruleset with what those of the loaded one have."""
    filled = []
    netdev = _find_sets("netdev", (*_NETDEV_COUNTED, "leased4"))
    leases = netdev.pop("leased4", [])
    filled.append(("netdev", "leased4", list(_render_leases(leases, taps))))
    for family, sets in (("netdev", netdev), ("inet", _find_sets("inet", COUNTED))):
        for name, elements in sets.items():
            counts = [
                f"{quoted(interface)} counter packets {count.packets} bytes {count.bytes}"
                for interface, count in _parse_counts(elements)
                if interface in taps or name == "elsewhere"
            ]
            filled.append((family, name, counts))
    return "".join(
        f"add element {family} {TABLE} {name} {{ {', '.join(listed)} }}\n"
        for family, name, listed in filled
        if listed
    )


def _render_leases(elements: Iterable[Any], taps: frozenset[str]) -> Iterator[str]:
    for element in elements:
        match element:
            case {"elem": {"val": {"concat": [str(tap), int(address)]}, "expires": int(left)}} if (
                tap in taps
            ):
                yield f"{quoted(tap)} . 0x{address:08x} expires {max(left, 1)}s"


def _parse_counts(elements: Iterable[Any]) -> Iterator[tuple[str, Count]]:
    for element in elements:
        match element:
            case {"elem": {"val": str(name), "counter": {"packets": int(packets), "bytes": int(octets)}}}:
                yield name, Count(packets, octets)


def _find_sets(family: str, wanted: Iterable[str]) -> dict[str, list[Any]]:
    """The elements by set; {} where the table is not there."""
    wanted = frozenset(wanted)
    if not any(key[:2] == (family, TABLE) for key in _find_chains()):
        return {}
    listed = _list(["sets", "table", family, TABLE])
    return {
        entry["name"]: entry.get("elem", []) for entry in listed.get("set", []) if entry["name"] in wanted
    }


def _find_chains() -> dict[tuple[str, str, str], Mapping[str, Any]]:
    """All tables' chains by family, table and name."""
    return {
        (chain["family"], chain["table"], chain["name"]): chain
        for chain in _list(["chains"]).get("chain", [])
    }


def _list(what: list[str]) -> dict[str, list[Any]]:
    """Objects by kind."""
    text = _run(["-j", "list", *what])
    found: dict[str, list[Any]] = {}
    try:
        for entry in json.loads(text)["nftables"]:
            for kind, value in entry.items():
                found.setdefault(kind, []).append(value)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failed("nft's answer cannot be read", HINT) from error
    return found


def _run(arguments: list[str], text: str = "") -> str:
    try:
        done = subprocess.run(
            [NFT, *arguments],
            input=text,
            capture_output=True,
            text=True,
            env={},
            timeout=NFT_SECONDS,
            check=False,
        )
    except OSError as error:
        raise Failed(f"{NFT}: {error.strerror}", HINT) from error
    except subprocess.TimeoutExpired as error:
        raise Failed(f"nft was not done after {NFT_SECONDS} s", HINT) from error
    if done.returncode:
        first = next(iter(done.stderr.splitlines()), f"status {done.returncode}")
        raise Failed(f"nft refuses: {first[:200]}", HINT)
    return done.stdout
