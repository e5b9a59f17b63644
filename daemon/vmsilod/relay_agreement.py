"""What the relay knows and what the registry knows, made one: after each (re)connection to the relay.

Called by the runs, on the loop. Guest readiness is the relay's truth, which VMs there are is vmsilod's.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vmsilod.bus.views import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmsilod.registry import Registry, Vm
    from vmsilod.relay_client import RelayClient

log = logging.getLogger(__name__)


async def agree_with_relay(relay: RelayClient, registry: Registry, on_change: Callable[[Vm], None]) -> bool:
    """Take over guest readiness, remove VMs that only the relay has; returns whether it listens on vsock."""
    answer = await relay.find_vms()
    for entry in answer["vms"]:
        vm = registry.find(entry["name"])
        if vm is None or vm.record is None or vm.record.invocation != entry["generation"]:
            if vm is None or not vm.lock.held:
                await relay.remove(entry["name"], entry["generation"])
            continue
        vm.agent, vm.ready, vm.status = entry["agent"], entry["ready"], printable(entry["status"])
        on_change(vm)
    known = {entry["name"] for entry in answer["vms"]}
    for vm in registry:
        if vm.record is not None and vm.record.launched and vm.name not in known:
            log.error("VM %s: the relay was stopped and does not know it any more; restart the VM", vm.name)
            vm.agent = vm.ready = False
            vm.status = "unreachable: the relay was stopped; restart the VM"
            on_change(vm)
    return bool(answer.get("listening_vsock"))
