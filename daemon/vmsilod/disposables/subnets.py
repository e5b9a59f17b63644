"""Networks of their own for disposables: of the configured ranges the next one that nobody has.

Pure but for a random start, so that an address is not used again at once by another disposable, to which the
host's connection tracking would give what is left of the last one's connections.
"""

from __future__ import annotations

import ipaddress
import secrets
from typing import TYPE_CHECKING

from vmsilod.config.disposables import V4_BITS, V6_BITS
from vmsilod.errors import Busy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmsilod.config.disposables import DisposableOptions
    from vmsilod.network.plan import Network

TRIES = 4096


class Subnets:
    """What is free of the ranges; each call takes one more. For one derivation, then thrown away."""

    def __init__(self, options: DisposableOptions, taken: Iterable[Network]) -> None:
        self._v4 = ipaddress.IPv4Network(options.network)
        self._v6 = ipaddress.IPv6Network(options.network_v6)
        listed = list(taken)
        self._taken_v4 = [net for net in listed if isinstance(net, ipaddress.IPv4Network)]
        self._taken_v6 = [net for net in listed if isinstance(net, ipaddress.IPv6Network)]

    def take_v4(self) -> ipaddress.IPv4Network:
        """Raises Busy when all are in use."""
        size = 1 << (32 - V4_BITS)
        count = self._v4.num_addresses // size
        first = int(self._v4.network_address)
        for index in _walk(count):
            found = ipaddress.IPv4Network((first + index * size, V4_BITS))
            if not any(found.overlaps(other) for other in self._taken_v4):
                self._taken_v4.append(found)
                return found
        raise Busy(f"no network of {self._v4} is free", "set disposables.network in vmsilo.toml")

    def take_v6(self) -> ipaddress.IPv6Network:
        size = 1 << (128 - V6_BITS)
        count = self._v6.num_addresses // size
        first = int(self._v6.network_address)
        for index in _walk(count):
            found = ipaddress.IPv6Network((first + index * size, V6_BITS))
            if not any(found.overlaps(other) for other in self._taken_v6):
                self._taken_v6.append(found)
                return found
        raise Busy(f"no network of {self._v6} is free", "set disposables.network_v6 in vmsilo.toml")


def _walk(count: int) -> Iterable[int]:
    """From somewhere once around; of a very large range a part."""
    start = secrets.randbelow(count)
    return ((start + step) % count for step in range(min(count, TRIES)))
