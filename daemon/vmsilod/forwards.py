"""The forwarded ports of running VMs: their listeners on the host, and the unit that copies.

Owned by runs.py, which opens a VM's forwards when it starts and closes them when its leases are given back.
The unit's process (vmsilo_forward) asks over the control socket for what it forwards; it gets the listeners,
which it then keeps over its own crashes, and one end of a socket pair whose other end goes to the relay.
This daemon never copies a byte, and a restart of it changes nothing. The unit is bound to the VM's: when
that ends, so do the listeners.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from typing import TYPE_CHECKING, Any

from vmsilod import loop
from vmsilod.errors import BadRequest, StartFailed, VmsiloError
from vmsilod.units.forward import forward_unit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmsilod.config import VmConfig
    from vmsilod.config.forward_ports import ForwardPort
    from vmsilod.control import Peer
    from vmsilod.registry import Registry, Vm
    from vmsilod.relay_client import RelayClient
    from vmsilod.systemd import Systemd

log = logging.getLogger(__name__)

BACKLOG = 128


class Forwards:
    """`relay()` raises a VmsiloError as long as there is none."""

    def __init__(self, registry: Registry, systemd: Systemd, relay: Callable[[], RelayClient]) -> None:
        self._registry = registry
        self._systemd = systemd
        self._relay = relay
        self._unasked: dict[str, list[int]] = {}  # listeners that the VM's unit has not asked for yet

    async def open(self, vm: Vm, config: VmConfig) -> None:
        """Listen, and start the unit; raises StartFailed with the port that is in use."""
        forwards = config.network.forward_ports
        if not forwards:
            return
        assert vm.record is not None
        self._unasked[vm.name] = await loop.in_worker(bind_listeners, vm.name, forwards)
        unit = forward_unit(vm.record.unit)
        if await self._systemd.start_bound(unit) != "done":
            raise StartFailed(f"the port forwards of VM '{vm.name}' did not start", f"journalctl -u {unit}")

    async def answer(self, peer: Peer, *, listening: bool) -> tuple[dict[str, Any], list[int]]:
        """What the unit's process forwards, and its descriptors, which are the caller's: the link, then the
        listeners, unless it has them.
        """
        vm = self._registry.require(peer.name)
        config = vm.started
        if vm.record is None or config is None or forward_unit(vm.record.unit) != peer.unit:
            raise BadRequest(f"unit {peer.unit} forwards for a VM that does not run")
        forwards = config.network.forward_ports
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, its:
            await self._relay().forward(vm.name, vm.record.invocation, ours.fileno())
            listeners = [] if listening else self._unasked.pop(vm.name, None)
            if listeners is None:  # those of a process that died before systemd had them are free again
                listeners = await loop.in_worker(bind_listeners, vm.name, forwards)
            reply = {
                "forwards": [
                    (forward.side == "host", str(forward.host_address), forward.host_port, forward.guest)
                    for forward in forwards
                ]
            }
            return reply, [its.detach(), *listeners]

    async def close(self, vm: Vm) -> None:
        """The ports are free when this returns, so that the next start can have them."""
        close_all(self._unasked.pop(vm.name, []))
        if vm.record is None or vm.started is None or not vm.started.network.forward_ports:
            return
        try:
            await self._systemd.stop(forward_unit(vm.record.unit))
        except VmsiloError as error:
            log.info("VM %s: %s", vm.name, error)


def bind_listeners(name: str, forwards: Sequence[ForwardPort]) -> list[int]:
    """One listening socket per forward from the host, in their order."""
    fds: list[int] = []
    try:
        for forward in forwards:
            if forward.side == "host":
                fds.append(bind_listener(name, forward))
    except BaseException:
        close_all(fds)
        raise
    return fds


def bind_listener(name: str, forward: ForwardPort) -> int:
    """Raises StartFailed that names the port."""
    v6 = forward.host_address.version == 6
    with socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_STREAM) as sock:
        # Connections of the last run may still be in TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            sock.bind((str(forward.host_address), forward.host_port))
            sock.listen(BACKLOG)
        except OSError as error:
            raise StartFailed(*explain(name, forward, error)) from error
        return sock.detach()


def explain(name: str, forward: ForwardPort, error: OSError) -> tuple[str, str]:
    port = f"port {forward.host_port} of {forward.host_address}"
    if error.errno == errno.EADDRINUSE:
        return (
            f"{port} is in use, so VM '{name}' cannot forward it",
            f"ss -ltnp 'sport = :{forward.host_port}'; or another port in network.forward_ports",
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"the host has no address {forward.host_address}, so VM '{name}' cannot forward its port "
            f"{forward.host_port}",
            "ip address; network.forward_ports names the address",
        )
    return f"VM '{name}' cannot forward {port}: {error.strerror}", ""


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
