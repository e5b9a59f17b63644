"""The memory of a running VM: what it has, and a change of it up to memory_max.

Called by the lifecycle for the bus. The VMM is the truth about sizes, the configuration that the VM was
started with about the limits; nothing is kept here. Sizes are MiB on the bus, bytes in a MonitorClient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsilod import loop
from vmsilod.errors import BadRequest, ConfigBroken, NotRunning
from vmsilod.resources import rundir
from vmsilod.vmm import drivers
from vmsilod.vmm.choose import VmmKind

if TYPE_CHECKING:
    from vmsilod.config.model import VmConfig
    from vmsilod.registry import Vm
    from vmsilod.vmm.monitor import MonitorClient

MIB = 1 << 20
STEP = 2
"""MiB: blocks of virtio-mem."""


async def read_memory(vm: Vm) -> dict[str, int]:
    """`configured` and `maximum`, and of a running VM `requested` and `actual`."""
    config = vm.started or vm.config
    if config is None:
        raise ConfigBroken(f"VM '{vm.name}' is disabled: {'; '.join(vm.problems)}", "vmsilo check")
    limits = {"configured": config.memory, "maximum": config.memory_max or config.memory}
    if not vm.is_up or vm.record is None:
        return limits
    if config.memory_max is None:
        return limits | {"requested": config.memory, "actual": config.memory}
    state = await loop.in_worker(_open_monitor(vm).memory_state)
    return limits | {"requested": state.requested // MIB, "actual": state.actual // MIB}


async def resize_memory(vm: Vm, size: int) -> dict[str, int]:
    """Ask the guest to have `size` MiB; it answers when the VMM has taken that, not when the guest has."""
    config = vm.started
    if config is None or not vm.is_up:
        raise NotRunning(f"VM '{vm.name}' is not running", f"vm-start {vm.name}")
    _check_size(config, size)
    await loop.in_worker(_open_monitor(vm).resize_memory, size * MIB)
    return await read_memory(vm)


def _check_size(config: VmConfig, size: int) -> None:
    if config.memory_max is None:
        raise BadRequest(
            f"the memory of VM '{config.name}' is fixed",
            "set memory_max in its configuration (not with crosvm), and restart it",
        )
    if not config.memory <= size <= config.memory_max:
        raise BadRequest(
            f"{size} MiB is not between memory ({config.memory}) and memory_max ({config.memory_max})"
        )
    if (size - config.memory) % STEP:
        raise BadRequest(
            f"{size} MiB is not a whole number of blocks", f"{size + 1} is; a block has {STEP} MiB"
        )


def _open_monitor(vm: Vm) -> MonitorClient:
    assert vm.record is not None
    return drivers.DRIVERS[VmmKind(vm.record.vmm)].open_monitor(rundir.VM_DIR / vm.name / "monitor.sock")
