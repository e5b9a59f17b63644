"""How a VM of the registry looks on the bus. Pure; called by the lifecycle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsilod.bus.views import VmView
from vmsilod.units.shares import home_path

if TYPE_CHECKING:
    from vmsilod.config import VmConfig
    from vmsilod.registry import Vm


START_UNDER_WAY = (1 << 64) - 1


def view_of(vm: Vm) -> VmView:
    """What runs is shown with the configuration that it was started with."""
    shown = vm.started if vm.is_up and vm.record is not None else vm.config
    return VmView(
        name=vm.name,
        state=vm.state,
        status=vm.status or vm.planned,
        color=shown.color if shown else "",
        memory=shown.memory if shown else 0,
        cpus=shown.cpus if shown else 0,
        vmm=vm.record.vmm if vm.record is not None else (shown.vmm if shown else ""),
        restart_needed=vm.restart_needed,
        restart_reasons=vm.restart_reasons,
        image=shown.image if shown else "",
        image_version=vm.record.version if vm.record is not None else "",
        problems=vm.problems,
        pid=vm.unit.main_pid if vm.is_up else 0,
        uid=vm.record.uid if vm.record is not None else 0,
        cid=vm.record.cid if vm.record is not None else 0,
        since=vm.unit.active_since if vm.is_up else 0,
        start_over=START_UNDER_WAY if vm.preparing and vm.is_up else vm.prepared,
        last_result=vm.last_result,
        last_outcome=vm.last.kind.value if vm.last is not None else "",
        auto_start=shown.auto_start if shown else False,
        depends_on=shown.depends_on if shown else (),
        unit=vm.debug_service if vm.debug else vm.service,
        disposable=shown.disposable if shown else False,
        template=(shown.template or "") if shown else "",
        shares=describe_shares(shown, vm.record.login if vm.record is not None else "") if shown else (),
    )


def describe_shares(config: VmConfig, login: str) -> tuple[str, ...]:
    """Each as HOST:GUEST[:ro]; the name of the guest's user is known once the VM has run."""
    home = home_path(config)
    shares = [] if home is None else [f"{home}:{f'/home/{login}' if login else '~'}"]
    shares += [
        f"{entry.path}:{entry.mount}{':ro' if entry.readonly else ''}" for entry in config.shared_directories
    ]
    return tuple(shares)
