"""VM-to-VM networks: each is a network namespace in which the kernel forwards between the VMs' TAPs, and
which nothing of the host is in.

Owned by the pool, which calls it on the main loop: `apply` after each change, `open` at a VM's start,
`repair` when somebody else may have changed something. It keeps no memory beyond the last plan: the holders'
units tell which networks there are, and each namespace what is in it; so a vmsilod that starts anew goes on
with them.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Protocol

from vmsilod.errors import StartFailed, VmsiloError
from vmsilod.network.namespaces import run_inside
from vmsilod.network.switch_batch import establish, open_port
from vmsilod.network.traffic import describe_port, find_port_views
from vmsilod.waiting import Lock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsilod.bus.views import NetworkView
    from vmsilod.network.plan import NetworkPlan, Port

log = logging.getLogger(__name__)


class NamespaceHolders(Protocol):
    """Keeps namespaces alive beyond vmsilod; in the daemon these are units (`SwitchUnits`)."""

    async def find(self) -> frozenset[str]:
        """The networks that are held."""

    async def hold(self, networks: frozenset[str]) -> None:
        """These too, from now on."""

    async def open(self, network: str) -> int:
        """The namespace of a held one; the descriptor is the caller's."""

    async def release(self, networks: frozenset[str]) -> None:
        """These no more: all that is in there ends."""


class Switches:
    def __init__(self, holders: NamespaceHolders) -> None:
        self._holders = holders
        self._lock = Lock()
        self._networks: dict[str, tuple[Port, ...]] = {}
        self.faults: dict[str, str] = {}
        """Per network why it is not as it should be: then no VM starts on it."""

    async def apply(self, plan: NetworkPlan) -> None:
        """`plan` has the ports of running VMs too. Never fails as a whole: see `faults`."""
        networks: dict[str, tuple[Port, ...]] = {}
        for port in plan.ports:
            if port.network:
                networks[port.network] = (*networks.get(port.network, ()), port)
        async with self._lock:
            self._networks = networks
            await self._agree()

    async def repair(self) -> None:
        async with self._lock:
            await self._agree()

    async def open(self, port: Port) -> list[int]:
        """The TAP's queues; rebuilds what is missing first. The descriptors are the caller's. Raises
        StartFailed.
        """
        async with self._lock:
            ports = self._networks.get(port.network, ())
            if port not in ports:
                raise StartFailed(
                    f"the network '{port.network}' has no port for {port.vm}'s {port.interface}"
                )
            try:
                await self._holders.hold(frozenset({port.network}))
                namespace = await self._holders.open(port.network)
                try:
                    return await run_inside(namespace, open_port, ports, port)
                finally:
                    os.close(namespace)
            except VmsiloError as error:
                fact = f"the network '{port.network}' is not in place for VM '{port.vm}': {error.message}"
                raise StartFailed(fact, error.hint) from error

    async def find_views(self, ports: Sequence[Port]) -> list[NetworkView]:
        """Of these ports what passes them. Raises Failed."""
        found: list[NetworkView] = []
        async with self._lock:
            for network in sorted({port.network for port in ports}):
                there = [port for port in ports if port.network == network]
                fault = self.faults.get(network, "")
                try:
                    namespace = await self._holders.open(network)
                except VmsiloError as error:
                    found += [
                        describe_port(port, "broken", fault or error.message, kinds={}) for port in there
                    ]
                    continue
                try:
                    found += await run_inside(namespace, find_port_views, there, fault)
                finally:
                    os.close(namespace)
        return found

    async def _agree(self) -> None:
        self.faults = {}
        try:
            held = await self._holders.find()
            await self._holders.hold(frozenset(self._networks))
        except VmsiloError as error:
            log.error("%s", error)
            self.faults = dict.fromkeys(self._networks, error.message)
            return
        unused = set()
        for network in sorted(held | self._networks.keys()):
            try:
                if not await self._establish(network) and network not in self._networks:
                    unused.add(network)
            except VmsiloError as error:
                log.error("network %s: %s", network, error)
                self.faults[network] = error.message
        if unused:
            try:
                await self._holders.release(frozenset(unused))
            except VmsiloError as error:
                log.error("%s", error)

    async def _establish(self, network: str) -> frozenset[str]:
        """The VMs that are on it though it has no port for them."""
        namespace = await self._holders.open(network)
        try:
            return await run_inside(namespace, establish, self._networks.get(network, ()))
        finally:
            os.close(namespace)
