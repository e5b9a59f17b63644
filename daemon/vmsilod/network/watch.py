"""Says when somebody changed vmsilo's tables of nftables, or a network device: the kernel's own events over
netlink.

Owned by main. Nothing is taken from an event but that there was one of that kind: whoever is told looks for
itself. Lost events (a full queue) count as one. Rules are reported at once, devices once things are quiet.
"""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING

from gi.repository import GLib

from vmsilod import loop
from vmsilod.events import drain

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
# A network that the host is in counts for the rules, so its addresses and routes are watched too; and
# whether it forwards (RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV6_NETCONF).
RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR = 1 << 0, 1 << 4, 1 << 8
RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_ROUTE = 1 << 6, 1 << 10
RTMGRP_NETCONF = 1 << 23 | 1 << 24
RTMGRP_ALL = (
    RTMGRP_LINK
    | RTMGRP_IPV4_IFADDR
    | RTMGRP_IPV6_IFADDR
    | RTMGRP_IPV4_ROUTE
    | RTMGRP_IPV6_ROUTE
    | RTMGRP_NETCONF
)
NFNLGRP_NFTABLES = 7
OUR_TABLES = b"vmsilo"
SETTLE_SECONDS = 0.3


class NetworkWatch:
    """Calls on_rules() and on_links() until close()."""

    def __init__(self, on_rules: Callable[[], None], on_links: Callable[[], None]) -> None:
        self._on_rules = on_rules
        self._on_links = on_links
        self._timer = 0
        self._sockets: list[socket.socket] = []
        self._sources: list[int] = []
        try:
            rules = self._open(NETLINK_NETFILTER, 1 << (NFNLGRP_NFTABLES - 1))
            links = self._open(NETLINK_ROUTE, RTMGRP_ALL)
        except OSError as error:
            log.error("changes of the network by others are not seen: %s", error.strerror)
            self.close()
            return
        self._sources = [
            loop.watch_fd(rules.fileno(), lambda: self._read_rules(rules)),
            loop.watch_fd(links.fileno(), lambda: self._read_links(links)),
        ]

    def close(self) -> None:
        for source in self._sources:
            GLib.source_remove(source)
        for sock in self._sockets:
            sock.close()
        self._sources, self._sockets = [], []
        if self._timer:
            GLib.source_remove(self._timer)
            self._timer = 0

    def _open(self, protocol: int, groups: int) -> socket.socket:
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        sock = socket.socket(socket.AF_NETLINK, kind, protocol)
        self._sockets.append(sock)
        sock.bind((0, groups))
        return sock

    def _read_rules(self, sock: socket.socket) -> None:
        # Each message names its table; most are about tables of others, and nothing to us.
        if drain(sock, lambda event: OUR_TABLES in event):
            self._on_rules()

    def _read_links(self, sock: socket.socket) -> None:
        if drain(sock, lambda _event: True) and not self._timer:
            self._timer = loop.call_later(SETTLE_SECONDS, self._tell_links)

    def _tell_links(self) -> None:
        self._timer = 0
        self._on_links()
