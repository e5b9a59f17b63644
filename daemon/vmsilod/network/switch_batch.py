"""Makes one VM-to-VM network what its ports say: the namespace's own switches, its TAPs, rules, routes and
neighbours.

Called by the switch, in a thread that is in the network's namespace, one at a time. All that it needs to
know is in there, so whatever died half-way, the next call goes on from what it finds. Rules are loaded
before a port is up. A TAP that a VMM has open is never removed; one that is no port (any more) passes
nothing.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
from contextlib import ExitStack
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING

from vmsilod.errors import Failed, StartFailed
from vmsilod.network import taps
from vmsilod.network.links import open_links
from vmsilod.network.routes import Neighbour, Way, open_ways
from vmsilod.network.sight import alias_of, fits, host_mac, is_ours
from vmsilod.network.switch_ruleset import TABLE, render_switch_ruleset, seal_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vmsilod.network.links import Link, Links
    from vmsilod.network.plan import Port
    from vmsilod.network.routes import Ways

log = logging.getLogger(__name__)

NET = Path("/proc/sys/net")
CHUNK = 128
"""TAPs made at once: each is a descriptor until it is persistent."""
RING_FRAMES = 128
"""How much waits for a guest that does not keep up. The TAP driver of Linux 6.18 and before does not stop
the queue in front of a full ring (tun_net_xmit), which therefore never has anything to order: this ring, of
1000 frames if nobody says otherwise, is where latency grows. 32 lost what came at once.
"""
FAIR = "fq_codel"
NFT_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

# Before there is a port: what a new device has, it has from `default`; `all` is not enough for every one.
_STACK4 = {
    f"ipv4/conf/{which}/{name}": value
    for which in ("all", "default")
    for name, value in (
        ("proxy_arp", "1"),
        ("rp_filter", "1"),
        ("send_redirects", "0"),
        ("accept_redirects", "0"),
        ("accept_source_route", "0"),
    )
}
_STACK6 = {
    f"ipv6/conf/{which}/{name}": value
    for which in ("all", "default")
    for name, value in (
        ("proxy_ndp", "1"),
        ("accept_ra", "0"),
        ("accept_redirects", "0"),
        ("accept_source_route", "0"),
        ("accept_dad", "0"),
    )
}


def establish(ports: Sequence[Port]) -> frozenset[str]:
    """Make it so; returns the VMs that still have a TAP open which is none of these ports. Raises Failed."""
    with_ipv6 = any(own.version == 6 for port in ports for own in port.addresses)
    _prepare_stack(with_ipv6=with_ipv6)
    with open_links() as links:
        left = _remove_others(links, ports)
        present = links.find_all()
        _create_taps(links, [port for port in ports if port.tap not in present])
        present = links.find_all()
        devices = {name: link.index for name, link in present.items() if link.tap is not None}
        if not devices:
            return frozenset()
        try:
            _load_rules(render_switch_ruleset(ports, devices))
        except Failed:
            if not _has_rules():
                _forward("0")
            raise
        _forward("1")
        with open_ways() as ways:
            _set_queues(ways, [present[port.tap] for port in ports])
            for port in ports:
                _answer_at_once(port.tap, with_ipv6=with_ipv6)
                if not present[port.tap].up:
                    links.set_state(devices[port.tap], up=True)
            ways.agree(*plan_ways(ports, devices))
    return left


def open_port(ports: Sequence[Port], port: Port) -> list[int]:
    """Descriptors of the TAP's queues, once all is as it must be. Raises StartFailed or Failed."""
    establish(ports)
    with open_links() as links:
        link = links.find_all().get(port.tap)
    if link is None or not link.up or not fits(link, port):
        raise StartFailed(f"the TAP '{port.tap}' is not as vmsilo made it")
    return taps.open_queues(port, link.index)


def plan_ways(ports: Sequence[Port], devices: Mapping[str, int]) -> tuple[set[Way], set[Neighbour]]:
    """The routes and neighbours of a network. Pure."""
    ways: dict[object, Way] = {}
    neighbours: set[Neighbour] = set()
    own6 = {own.ip for port in ports for own in port.addresses if own.version == 6}
    for port in ports:
        index = devices[port.tap]
        for own in port.addresses:
            ways.setdefault(ip_network(own.ip), Way(ip_network(own.ip), index))
            neighbours.add(Neighbour(own.ip, index, port.mac))
        mine = {own.ip for own in port.addresses}
        neighbours |= {Neighbour(address, index) for address in own6 - mine}
    for port in ports:
        for served in port.served:
            via = next((own.ip for own in port.addresses if own.version == served.version), None)
            if via is None:
                log.warning("VM %s serves %s, but has no address of that kind: ignoring it", port.vm, served)
            else:
                ways.setdefault(served, Way(served, devices[port.tap], via))
    return set(ways.values()), neighbours


def _prepare_stack(*, with_ipv6: bool) -> None:
    for name, value in _STACK4.items():
        _write(name, value)
    if not (NET / "ipv6").is_dir():
        if with_ipv6:
            raise Failed("this kernel has no IPv6, or it was switched off at boot")
        return
    for name, value in _STACK6.items():
        _write(name, value)
    for which in ("all", "default"):
        _write(f"ipv6/conf/{which}/disable_ipv6", "0" if with_ipv6 else "1")


def _forward(value: str) -> None:
    for family in ("ipv4", "ipv6"):
        for which in ("all", "default"):
            if (NET / family).is_dir():
                _write(f"{family}/conf/{which}/forwarding", value)


def _answer_at_once(tap: str, *, with_ipv6: bool) -> None:
    """Of this one there is no default in a namespace: the kernel's is 0.8 s."""
    for family in ("ipv4", "ipv6") if with_ipv6 else ("ipv4",):
        _write(f"{family}/neigh/{tap}/proxy_delay", "0")


def _write(name: str, value: str) -> None:
    """Only what differs: some of these begin a great cleaning each time."""
    path = NET / name
    try:
        if path.read_text().strip() != value:
            path.write_text(value)
    except OSError as error:
        raise Failed(f"cannot set {name} of a network: {error.strerror}") from error


def _remove_others(links: Links, ports: Sequence[Port]) -> frozenset[str]:
    wanted = {port.tap: port for port in ports}
    doomed: list[Link] = []
    left = set()
    for name, link in links.find_all().items():
        port = wanted.get(name)
        if link.tap is None or (port is not None and fits(link, port)):
            continue
        if link.carrier:  # a VMM has it open
            left.add(link.alias.removeprefix("vmsilo:").partition(":")[0] if is_ours(link) else name)
        else:
            doomed.append(link)
    if doomed:
        links.delete(doomed)
    return frozenset(left)


def _create_taps(links: Links, ports: Sequence[Port]) -> None:
    for first in range(0, len(ports), CHUNK):
        with ExitStack() as stack:
            for port in ports[first : first + CHUNK]:
                fd = taps.create_tap(port.tap, queues=port.queues, offload=port.offload)
                stack.callback(os.close, fd)
                links.mark(socket.if_nametoindex(port.tap), alias=alias_of(port), mac=host_mac(port))
                taps.make_persistent(fd)


def _set_queues(ways: Ways, ports: Iterable[Link]) -> None:
    kinds = ways.find_queueing()
    for link in ports:
        if kinds.get(link.index) == FAIR:
            continue
        ways.limit_ring(link.index, RING_FRAMES)
        if not ways.queue_fairly(link.index):
            log.debug("this kernel has no %s: ports queue as it does by itself", FAIR)


def _load_rules(ruleset: str) -> None:
    if _is_loaded(seal_of(ruleset)):
        return
    answer = _nft("-f", "-", text=ruleset)
    if answer.returncode != 0:
        raise Failed(f"cannot install the rules of a network: {answer.stderr.strip().partition(chr(10))[0]}")


def _has_rules() -> bool:
    """Older ones of ours hold for what is up."""
    try:
        return _is_loaded("comment")
    except Failed:
        return False


def _is_loaded(seal: str) -> bool:
    families = ("netdev", "inet")
    return all(seal in _nft("-t", "list", "table", family, TABLE).stdout for family in families)


def _nft(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """In this thread's namespace, which the child inherits."""
    try:
        return subprocess.run(
            ["nft", *arguments],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
            env={"PATH": NFT_PATH, "LC_ALL": "C"},
        )
    except OSError as error:
        raise Failed(f"cannot run nft: {error.strerror}", "apt-get install nftables") from error
    except subprocess.TimeoutExpired as error:
        raise Failed("nft does not end") from error
