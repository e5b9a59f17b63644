"""The firewall of all VMs as one text for `nft -f -`, made of a NetworkPlan: who may send what to whom.

Pure; called by the pool, whose text `nft.py` loads and finds again. It replaces both of vmsilo's tables,
`netdev vmsilo` (frames; `frame_rules.py`) and `inet vmsilo` (packets; here), in one transaction. No chain of
others is touched, and none of ours lets anything pass that another's drops. What is dropped is told in
docs/networks.md.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_network
from typing import TYPE_CHECKING

from vmsilod.network.frame_rules import (
    Ground,
    own_addresses,
    render_frame_rules,
    render_logs,
    render_opened,
)
from vmsilod.network.rule_text import (
    SIZE,
    allow_rules,
    host_allows,
    open_allows,
    quoted,
    render_chain,
    render_map,
    render_networks,
    render_set,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from ipaddress import IPv4Address, IPv6Address

    from vmsilod.network.plan import Network, NetworkPlan, Port

TABLE = "vmsilo"
FAMILIES = ("netdev", "inet")
COUNTED = ("denied", "inbound", "elsewhere")
"""Sets of the table `inet vmsilo` with a counter per interface."""

VERSION_PREFIX = "version-"
_VERSION = re.compile(r"^\tchain (version-[0-9a-f]+) \{$", re.MULTILINE)
_HOOK = re.compile(r"^\tchain in-(\S+) \{$", re.MULTILINE)
_TABLE = re.compile(rf"^table (\w+) {TABLE} \{{\n((?:\t.*\n)*)", re.MULTILINE)
_CHAIN = re.compile(r"^\tchain (\S+) \{\n((?:\t\t.*\n)*)\t\}$", re.MULTILINE)
_JUMP = re.compile(r"\b(?:goto|jump) ([A-Za-z0-9_.-]+)")

# Nobody's address on the internet: this network, private, shared (RFC 6598), loopback, link-local, protocol
# assignments, benchmarks, multicast, reserved. Of IPv6 only 2000::/3 is routed, and in that 6to4 holds
# addresses of IPv4.
CLOSED = tuple(
    ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4"),
        *("::/3", "2002::/16", "4000::/2", "8000::/1"),
    )
)
_UNIQUE_LOCAL = ip_network("fc00::/7")


@dataclass(frozen=True)
class Surroundings:
    """What the plan does not say: `nearby`, networks that the host itself is in, which are no internet,
    whatever their addresses; `devices`, the interfaces that exist, None for all of the plan's TAPs; `host`,
    the host's own addresses but those of the plan; `lent`, the versions of IP that the NAT interface
    forwards for VMs alone.
    """

    nearby: tuple[Network, ...] = ()
    devices: frozenset[str] | None = None
    host: tuple[IPv4Address | IPv6Address, ...] = ()
    lent: frozenset[int] = frozenset()


def render_ruleset(plan: NetworkPlan, surroundings: Surroundings | None = None) -> str:
    """Raises Failed for a name that cannot be in a rule."""
    surroundings = surroundings or Surroundings()
    digest = hashlib.sha256(_render_tables(plan, surroundings, "").encode()).hexdigest()
    return render_removal() + _render_tables(plan, surroundings, VERSION_PREFIX + digest[:40])


def render_removal() -> str:
    # `add` before `delete`: there may be none yet. In one transaction with what follows.
    return "".join(f"{verb} table {family} {TABLE}\n" for family in FAMILIES for verb in ("add", "delete"))


def version_in(text: str) -> str:
    """Of a rendered ruleset: the name of a chain in both tables, made of all of its text."""
    found = _VERSION.search(text)
    return found.group(1) if found else ""


def taps_in(text: str) -> frozenset[str]:
    """The TAPs that a rendered ruleset hooks, each in the chain `in-TAP`."""
    return frozenset(_HOOK.findall(text))


@lru_cache(maxsize=2)
def uses_in(text: str) -> Mapping[tuple[str, str], int]:
    """What uses each chain of a rendered ruleset, by family and name: its own rules, and the rules and the
    elements of maps that lead to it. The kernel counts the same (NFTA_CHAIN_USE).
    """
    found: Counter[tuple[str, str]] = Counter()
    for family, content in _TABLE.findall(text):
        for name, body in _CHAIN.findall(content):
            lines = (line.strip() for line in body.splitlines())
            found[family, name] += sum(not line.startswith(("#", "type ")) for line in lines)
        for line in content.splitlines():
            if not line.lstrip().startswith("#"):
                found.update((family, name) for name in _JUMP.findall(line))
    return found


def ports_of(plan: NetworkPlan) -> tuple[Port, ...]:
    """Those that are TAPs of the host's own network."""
    return tuple(port for port in plan.ports if not port.network and not port.link)


def _exists(port: Port, surroundings: Surroundings) -> bool:
    return surroundings.devices is None or port.tap in surroundings.devices


def _render_tables(plan: NetworkPlan, surroundings: Surroundings, version: str) -> str:
    ports = ports_of(plan)
    devices = frozenset(port.tap for port in ports if _exists(port, surroundings))
    closed = CLOSED + surroundings.nearby
    mark = f"\tchain {version} {{\n\t}}\n" if version else ""
    frames = render_frame_rules(ports, Ground(devices, closed, surroundings.host))
    packets = _render_packet_rules(plan, surroundings, closed)
    return f"table netdev {TABLE} {{\n{mark}{frames}}}\ntable inet {TABLE} {{\n{mark}{packets}}}\n"


def _render_packet_rules(plan: NetworkPlan, surroundings: Surroundings, closed: Sequence[Network]) -> str:
    ports = ports_of(plan)
    taps = [quoted(port.tap) for port in ports]
    return "".join(
        (
            render_set("taps", "type ifname", taps),
            render_set("dhcp", "type ifname", (quoted(port.tap) for port in ports if port.dhcp)),
            render_networks("closed4", 4, closed),
            render_networks("closed6", 6, closed),
            _render_places(ports),
            *(
                render_set(
                    name,
                    "type ifname",
                    (),
                    flags=f"size {SIZE}\n\t\tflags dynamic\n\t\tcounter",
                )
                for name in COUNTED
            ),
            _render_opened(ports),
            _INPUT,
            _FORWARD.replace("LENT", _render_lent(plan.nat_interface, surroundings.lent)),
            _render_internet(plan.nat_interface, ports),
        )
    )


def _render_places(ports: Sequence[Port]) -> str:
    """Each address of a VM, and each with the interface that it may come from."""
    texts = []
    for version in (4, 6):
        homes = [
            (port.bridge or port.tap, own)
            for port in ports
            for own in own_addresses(port)
            if own.version == version
        ]
        kind = f"ipv{version}_addr"
        texts += [
            render_set(f"own{version}", f"type {kind}", (str(own) for _, own in homes)),
            render_set(
                f"home{version}", f"type ifname . {kind}", (f"{quoted(home)} . {own}" for home, own in homes)
            ),
        ]
    return "".join(texts) + _render_subnet_homes(ports)


def _render_subnet_homes(ports: Sequence[Port]) -> str:
    """What DHCP gives to a VM is some address of its TAP's subnet: none of that comes from elsewhere either,
    but for the host's own, which it uses to speak to itself.
    """
    chains: list[str] = []
    homes: dict[Network, str] = {}
    quoting: dict[str, str] = {}
    for port in ports:
        for host in port.host_addresses:
            # nft refuses a map with overlaps; the configuration has none.
            if port.dhcp and host.version == 4 and not any(_overlap(host.network, home) for home in homes):
                homes[host.network] = f"jump home-{port.tap}"
        if port.dhcp and port.host_addresses:
            rule = f'iifname != {{ {quoted(port.tap)}, "lo" }} goto elsewhere'
            chains.append(render_chain(f"home-{port.tap}", (rule,)))
            quoting[quoted(port.tap)] = f"jump quoted-{port.tap}"
            chains.append(render_chain(f"quoted-{port.tap}", _quoted_rules(port)))
    jumps = {str(network): jump for network, jump in homes.items()}
    return "".join(
        (
            *chains,
            render_map("homes4", "type ipv4_addr : verdict", jumps, flags="flags interval"),
            render_map("quoted_homes", "type ifname : verdict", quoting),
        )
    )


def _quoted_rules(port: Port) -> list[str]:
    return [
        f"ct original ip {end} {host.network} ct original ip {end} != {host.ip} accept"
        for host in port.host_addresses
        if host.version == 4
        for end in ("saddr", "daddr")
    ]


def _overlap(one: Network, other: Network) -> bool:
    return one.network_address in other or other.network_address in one


def _render_opened(ports: Sequence[Port]) -> str:
    out, out_jumps = render_opened(
        ports, "open", {port.tap: allow_rules(open_allows(port)) for port in ports}
    )
    host, host_jumps = render_opened(
        ports, "host", {port.tap: allow_rules(host_allows(port)) for port in ports}
    )
    logs, log_jumps = render_logs(ports, "denied")
    maps = (("open_out", out_jumps), ("open_host", host_jumps), ("denied_logs", log_jumps))
    return "".join(
        (out, host, logs, *(render_map(name, "type ifname : verdict", jumps) for name, jumps in maps))
    )


# Only what answers passes as known, never what the guest began: so a change of what is open holds at once,
# also for connections that are there. Helpers' "related" connections are none of ours.
_REPLIES = """\
		ct direction reply ct state established accept
		ct state related meta l4proto { icmp, ipv6-icmp } IS
"""
_ASKED = _REPLIES.replace("IS", "accept")
# An error quotes what it is about: from a guest only what it sent or got itself, whatever is open to it. By
# others' it could end their connections, or hand them its bytes.
_OF_GUEST = _REPLIES.replace("IS", "goto quoted")

_INPUT = f"""\
	chain prerouting {{
		type filter hook prerouting priority raw - 10; policy accept;
		ip saddr @own4 iifname . ip saddr != @home4 goto elsewhere
		ip6 saddr @own6 iifname . ip6 saddr != @home6 goto elsewhere
		ip saddr vmap @homes4
	}}
	chain elsewhere {{
		update @elsewhere {{ iifname }}
		limit rate 6/minute burst 5 packets log prefix "vmsilo: address of a VM from elsewhere "
		drop
	}}
	chain quoted {{
		iifname . ct original ip saddr @home4 accept
		iifname . ct original ip daddr @home4 accept
		iifname . ct original ip6 saddr @home6 accept
		iifname . ct original ip6 daddr @home6 accept
		iifname vmap @quoted_homes
		goto denied
	}}
	chain input {{
		type filter hook input priority filter - 10; policy accept;
		iifname @taps goto to_host
	}}
	chain to_host {{
{_OF_GUEST}\
		icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
		iifname @dhcp udp sport 68 udp dport 67 accept
		iifname vmap @open_host
		# Every guest tells groups of itself: counted, but no line in the log.
		meta pkttype != host goto denied_quietly
		goto denied
	}}
"""

_FORWARD = f"""\
	chain forward {{
		type filter hook forward priority filter - 10; policy accept;
		iifname @taps goto from_vm
		oifname @taps goto to_vm
LENT	}}
	chain from_vm {{
{_OF_GUEST}\
		ct state invalid goto denied
		iifname vmap @open_out
		ip daddr @closed4 goto denied
		ip6 daddr @closed6 goto denied
		jump internet
		goto denied
	}}
	chain to_vm {{
{_ASKED}\
		update @inbound {{ oifname }}
		drop
	}}
	# What is counted here may find its set full, which ends its rule: so what is to be done is in the next.
	chain denied_quietly {{
		update @denied {{ iifname }}
		drop
	}}
	chain denied {{
		update @denied {{ iifname }}
		iifname vmap @denied_logs
		drop
	}}
"""


# A port of the guest's choice could be one that a service of the host answers on: what is sent to that
# service would reach the guest.
_TRANSLATED = "masquerade to :32768-60999 fully-random"


def _render_lent(nat_interface: str, lent: frozenset[int]) -> str:
    """The host became a router for its VMs: for its uplink's neighbours it is none."""
    if not nat_interface:
        return ""
    return "".join(
        f"\t\tmeta nfproto ipv{version} iifname {quoted(nat_interface)} drop\n" for version in sorted(lent)
    )


def _render_internet(nat_interface: str, ports: Sequence[Port]) -> str:
    """Global addresses of IPv6 are not translated: they are the VM's, and routed to it."""
    if not nat_interface:
        return "\tchain internet {\n\t}\n"
    routed = [port for port in ports if port.host_addresses]
    subnets = [host.network for port in routed for host in port.host_addresses]
    subnets += [ip_network(own) for port in routed for own in own_addresses(port)]
    local6 = [net for net in subnets if net.version == 6 and net.subnet_of(_UNIQUE_LOCAL)]  # type: ignore[arg-type]
    out = f"oifname {quoted(nat_interface)} iifname @routed"
    return "".join(
        (
            render_set("routed", "type ifname", (quoted(port.tap) for port in routed)),
            render_networks("nat4", 4, subnets),
            render_networks("nat6", 6, local6),
            f"\tchain internet {{\n\t\t{out} accept\n\t}}\n",
            "\tchain postrouting {\n\t\ttype nat hook postrouting priority srcnat - 10; policy accept;\n",
            *(
                f"\t\t{out} {private} {how}\n"
                for private in ("ip saddr @nat4", "ip6 saddr @nat6")
                for how in (f"meta l4proto {{ tcp, udp }} {_TRANSLATED}", "masquerade")
            ),
            "\t}\n",
        )
    )
