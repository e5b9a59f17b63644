"""macvtaps: interfaces of VMs that appear on a physical network of the host, with an address of their own.

Called in the worker when a VM starts and when it has ended. A macvtap lives from the one to the other: its
alias says whose it is, so that one which a killed daemon left is found. What the guest sends is filtered by
its source before the device is up (a netdev egress chain, which ends with the device); what it may reach is
not: the link is not routed by this host. Host and guest do not reach each other over it: macvlan hands
nothing from the link itself to its macvtaps, nor back.
"""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsilod.errors import Failed, StartFailed
from vmsilod.network.frame_rules import ND_OPTION_MAC, ND_TARGET, render_nd_chains
from vmsilod.network.names import derive_link_local
from vmsilod.network.rule_text import render_chain, render_set
from vmsilod.network.taps import TUNSETIFF, tap_flags

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmsilod.network.plan import Port

ALIAS = "vmsilo-macvtap:"
GROUP = 0x766F
"""The link group of the macvtaps of vmsilo: a device has it from its first moment, an alias only later."""
CHAIN = "from-vm"
_LIE, _CHECK_IP6 = "lie_nd", "check_ip6"
CHAINS = (CHAIN, _LIE, _CHECK_IP6)
"""Those of its filter that count what they drop."""
_DEVICES = Path("/dev")
_CLASS = Path("/sys/class/net")
_IPV6 = Path("/proc/sys/net/ipv6/conf")

_REQUEST = struct.Struct("16sH22x")  # ifreq: name, flags


def acquire(port: Port, install: Callable[[str], None]) -> list[int]:
    """Make the macvtap of this port and open it: a descriptor per queue, the caller's. `install` puts a text
    into nftables. Raises a VmsiloError, and then there is no macvtap.
    """
    with _open_netlink() as netlink:
        index = _create(netlink, port)
        try:
            install(render_filter(port))
            _silence(port)
            netlink.link("set", index=index, state="up")
            return _open_queues(port, index)
        except BaseException:
            netlink.link("del", index=index)
            raise


def release(vm: str, interface: str = "") -> None:
    """Remove every macvtap of a VM, or that of one interface; none is no error."""
    wanted = f"{vm}:{interface}"
    with _open_netlink() as netlink:
        for index in [
            index
            for index, owner, alias in _find_ours(netlink)
            if (alias == wanted if interface else owner == vm)
        ]:
            netlink.link("del", index=index)


def release_others(running: frozenset[str]) -> None:
    """Those that a daemon left that was killed, of VMs that do not run."""
    if any(_in_group(path) for path in _CLASS.glob("*/netdev_group")):
        for vm in find_owners() - running:
            release(vm)


def _in_group(path: Path) -> bool:
    try:
        return int(path.read_text(), 0) == GROUP
    except (OSError, ValueError):
        return False


def find_owners() -> set[str]:
    """The VMs that have macvtaps on this host."""
    with _open_netlink() as netlink:
        return {owner for _, owner, _ in _find_ours(netlink)}


def render_filter(port: Port) -> str:
    """What the guest may send: frames from its own address, claims and packets of its own addresses, or of
    any IPv4 address where it asks by DHCP or none is configured; no IPv6 without an address of that; never
    what a router or a DHCP server says.
    """
    v4 = [str(address.ip) for address in port.addresses if address.version == 4]
    v6 = [address.ip for address in port.addresses if address.version == 6]
    free = port.dhcp or not port.addresses
    arp = "" if free else f" arp saddr ip {{ {', '.join(['0.0.0.0', *v4])} }}"
    from_v4 = "" if free else f" ip saddr {{ {', '.join(v4)} }}"
    table = f"netdev {table_of(port)}"
    rules = [
        f"type filter hook egress device {port.tap} priority filter; policy drop;",
        f"ether saddr != {port.mac} counter drop",
        "udp sport { 67, 547 } counter drop",
        "icmpv6 type { nd-router-advert, nd-redirect } counter drop",
        f"ether type arp arp saddr ether {port.mac}{arp} accept",
        *([f"ether type ip{from_v4} accept"] if free or v4 else []),
        *([f"ether type ip6 goto {_CHECK_IP6}"] if v6 else []),
        "counter",
    ]
    return (
        f"add table {table}\ndelete table {table}\n"
        f"table {table} {{\n{_render_ip6(port) if v6 else ''}{render_chain(CHAIN, rules)}}}\n"
    )


def _render_ip6(port: Port) -> str:
    """What a TAP's IPv6 is asked, too."""
    own = [address.ip for address in port.addresses if address.version == 6]
    own.append(derive_link_local(port.mac))
    return "".join(
        (
            render_set("own6", "type ipv6_addr", map(str, own)),
            render_set("nd_own6", f"typeof {ND_TARGET}", (f"0x{int(address):032x}" for address in own)),
            render_set("nd_macs", f"typeof {ND_OPTION_MAC}", (f"0x{port.mac.replace(':', '')}",)),
            render_chain(_LIE, ("counter drop",)),
            render_nd_chains(""),
            render_chain(
                _CHECK_IP6,
                (
                    "ip6 hoplimit 255 exthdr frag exists goto lie_nd",
                    "icmpv6 type vmap { nd-neighbor-solicit : goto nd_solicit, "
                    "nd-neighbor-advert : goto nd_advert, nd-router-solicit : goto nd_router_solicit }",
                    "ip6 saddr @own6 accept",
                    "ip6 saddr :: icmpv6 type { mld-listener-report, mld2-listener-report } accept",
                    "counter",
                ),
            ),
        )
    )


def alias_of(port: Port) -> str:
    return f"{ALIAS}{port.vm}:{port.interface}"


def render_removal(port: Port) -> str:
    """Of the filter: its table stays when its device has ended."""
    return f"add table netdev {table_of(port)}\ndelete table netdev {table_of(port)}\n"


def table_of(port: Port) -> str:
    return f"vmsilo-macvtap-{port.tap}"


def _create(netlink: Any, port: Port) -> int:
    lower = netlink.link_lookup(ifname=port.link)
    if not lower:
        raise StartFailed(
            f"there is no network interface '{port.link}' for {port.interface} of VM '{port.vm}'"
        )
    _remove_half_made(netlink, port)
    netlink.link(
        "add",
        ifname=port.tap,
        kind="macvtap",
        macvtap_mode="bridge",
        link=lower[0],
        address=port.mac,
        num_tx_queues=port.queues,
        num_rx_queues=port.queues,
        group=GROUP,
    )
    (index,) = netlink.link_lookup(ifname=port.tap)
    netlink.link("set", index=index, ifalias=alias_of(port))
    (made,) = netlink.get_links(index)
    info = made.get_attr("IFLA_LINKINFO")
    shape = (
        made.get_attr("IFLA_ADDRESS"),
        made.get_attr("IFLA_LINK"),
        made.get_attr("IFLA_GROUP"),
        info.get_attr("IFLA_INFO_KIND"),
        info.get_attr("IFLA_INFO_DATA").get_attr("IFLA_MACVTAP_MODE"),
    )
    if shape != (port.mac, lower[0], GROUP, "macvtap", "bridge"):
        netlink.link("del", index=index)
        raise Failed(f"the kernel did not make '{port.tap}' as it was asked to: {shape}")
    return int(index)


def _silence(port: Port) -> None:
    """This host is not to speak with the guest's address, nor to be counted as the guest. What comes in goes
    to the guest before this host's stack sees it.
    """
    try:
        (_IPV6 / port.tap / "disable_ipv6").write_text("1")
    except FileNotFoundError:
        return  # this host has no IPv6
    except OSError as error:
        raise StartFailed(f"cannot switch IPv6 off on '{port.tap}': {error.strerror}") from error


def _remove_half_made(netlink: Any, port: Port) -> None:
    """What a vmsilod left that was killed between making it and saying whose it is."""
    for link in netlink.get_links():
        owned = link.get_attr("IFLA_IFALIAS")
        if link.get_attr("IFLA_IFNAME") == port.tap and link.get_attr("IFLA_GROUP") == GROUP and not owned:
            netlink.link("del", index=link["index"])


def _open_queues(port: Port, index: int) -> list[int]:
    device = _DEVICES / f"tap{index}"
    flags = tap_flags(port.queues, offload=port.offload)
    fds: list[int] = []
    try:
        number = (_CLASS / port.tap / f"tap{index}" / "dev").read_text().strip()
        for _ in range(port.queues):
            fds.append(fd := os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            node = os.fstat(fd).st_rdev
            if f"{os.major(node)}:{os.minor(node)}" != number:
                raise StartFailed(f"{device} is not the device of the macvtap '{port.tap}'")
            fcntl.ioctl(fd, TUNSETIFF, _REQUEST.pack(port.tap.encode(), flags))
    except BaseException as error:
        for fd in fds:
            os.close(fd)
        if isinstance(error, OSError):
            raise StartFailed(f"cannot open the macvtap '{port.tap}': {error.strerror}") from error
        raise
    return fds


def _find_ours(netlink: Any) -> Iterator[tuple[int, str, str]]:
    """Number, VM, VM:INTERFACE."""
    for link in netlink.get_links():
        info = link.get_attr("IFLA_LINKINFO")
        alias = link.get_attr("IFLA_IFALIAS") or ""
        if info and info.get_attr("IFLA_INFO_KIND") == "macvtap" and alias.startswith(ALIAS):
            name = alias.removeprefix(ALIAS)
            yield link["index"], name.partition(":")[0], name


@contextmanager
def _open_netlink() -> Iterator[Any]:
    # Late: 130 ms, and a host whose VMs have none never needs it.
    from pyroute2 import IPRoute, NetlinkError

    try:
        with IPRoute() as netlink:
            yield netlink
    except NetlinkError as error:
        text = error.args[1] if len(error.args) > 1 else error.code
        raise StartFailed(f"the kernel refused a macvtap: {text}") from error
