"""The VM registry: what is configured, what runs, and how the two differ.

State only: it knows neither D-Bus nor systemd, and changes nothing outside of itself. Owned by the
lifecycle, used on the GLib loop only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from vmsilod.config.model import VmConfig
from vmsilod.errors import NoSuchVm
from vmsilod.systemd import INACTIVE, UnitState
from vmsilod.vmm.outcome import Outcome, OutcomeKind
from vmsilod.waiting import Lock

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from concurrent.futures import Future

    from vmsilod.config.load import Configuration
    from vmsilod.resources.record import Record


@dataclass(eq=False)
class Vm:
    """One VM. `config` is what the files say now (None: broken or removed), `record` what the running VM
    was started with.
    """

    name: str
    config: VmConfig | None = None
    problems: tuple[str, ...] = ()
    configured: bool = True
    unit: UnitState = INACTIVE
    debug: bool = False
    record: Record | None = None
    agent: bool = False
    ready: bool = False
    was_ready: bool = False  # at least once in this run
    status: str = ""
    last: Outcome | None = None  # how the last run ended
    planned: str = ""  # what is to happen by itself while it does not run
    cid_fd: int | None = (
        None  # vhost-vsock descriptor that reserves the CID until the relay has forgotten it
    )
    vmm: Literal["crosvm", "qemu", "cloud-hypervisor"] | None = None  # what its unit was written for
    killing: str = ""  # the invocation that somebody wants to end at once
    preparing: int = 0  # starts that are being prepared, or wait for it
    prepared: int = 0  # when the last of them, or its unit's run, was over: CLOCK_MONOTONIC in microseconds
    lost_share: str = ""  # what ended of its own, without which the VM cannot go on
    stop_deadline: float | None = None
    lock: Lock = field(default_factory=Lock)
    waiters: list[Future[None]] = field(default_factory=list)
    images: Mapping[str, str] = field(default_factory=dict)  # current version of each image

    @property
    def last_result(self) -> str:
        """For people; "" where the run ended as somebody wished."""
        if self.last is None or self.last.kind in (OutcomeKind.STOPPED, OutcomeKind.POWERED_OFF):
            return ""
        return self.last.text

    @property
    def service(self) -> str:
        return f"vmsilo-{self.name}-vm.service"

    @property
    def debug_service(self) -> str:
        return f"vmsilo-{self.name}-debug.service"

    @property
    def socket(self) -> str:
        return f"vmsilo-{self.name}.socket"

    @property
    def is_up(self) -> bool:
        return self.unit.is_up

    @property
    def is_instance(self) -> bool:
        """Made of a template; no file says it."""
        return self.config is not None and self.config.template is not None

    @property
    def state(self) -> str:
        """stopped, starting (VMM or guest on its way), running (guest ready), stopping, failed, broken
        (configuration).
        """
        if self.unit.active == "deactivating":
            return "stopping"
        if self.unit.is_up:
            return "running" if self.ready else "starting"
        if self.config is None:
            return "broken"
        return "failed" if self.unit.active == "failed" else "stopped"

    @property
    def restart_needed(self) -> bool:
        return bool(self.restart_reasons)

    @property
    def restart_reasons(self) -> tuple[str, ...]:
        """What differs from what the VM was started with, for people."""
        started = self.started
        if started is None or not self.is_up:
            return ()
        reasons = []
        if self.config is None or self.config.digest() != started.digest():
            reasons.append("its configuration has changed")
        if self._image_moved(started.image):
            reasons.append(f"its image {started.image} has another current version")
        return tuple(reasons)

    def _image_moved(self, image: str) -> bool:
        used = self.record.version if self.record is not None else ""
        return used not in ("", "custom") and self.images.get(image, used) != used

    @property
    def started(self) -> VmConfig | None:
        """The configuration of the running VM, whatever the files say by now.

        A VM that outlived an upgrade may have been started with options that this version does not know:
        then the files have to do.
        """
        if self.record is None:
            return None
        try:
            return VmConfig.from_json(self.record.config)
        except ValueError:
            return self.config

    @property
    def started_as(self) -> VmConfig | None:
        """As `started`, with the VMM that "auto" had come to."""
        started = self.started
        if started is None or self.record is None:
            return started
        return started.model_copy(update={"vmm": self.record.vmm})

    def forget_run(self) -> None:
        """Nothing of a run is left: called when its leases were given back."""
        self.record = None
        self.agent = self.ready = self.was_ready = self.debug = False
        self.status = self.lost_share = ""
        self.stop_deadline = None


class Registry:
    """All VMs by name; a VM whose configuration is gone stays until it has stopped."""

    def __init__(self) -> None:
        self._vms: dict[str, Vm] = {}
        self.images: dict[str, str] = {}  # current version of each image; ImageWatch keeps it

    def __iter__(self) -> Iterator[Vm]:
        return iter([self._vms[name] for name in sorted(self._vms)])

    def find(self, name: str) -> Vm | None:
        return self._vms.get(name)

    def require(self, name: str) -> Vm:
        vm = self._vms.get(name)
        if vm is None:
            raise NoSuchVm(f"there is no VM '{name}'", "vmsilo list")
        return vm

    def adopt(self, name: str) -> Vm:
        """The VM of a run that a record names, whether or not it is still configured."""
        return self._vms.setdefault(name, Vm(name, configured=False, images=self.images))

    def apply(self, configuration: Configuration) -> None:
        """Take over a newly read configuration; running VMs keep what they were started with."""
        broken = configuration.broken
        names = set(configuration.vms) | set(broken)
        for name in names:
            vm = self._vms.setdefault(name, Vm(name, images=self.images))
            vm.config = configuration.vms.get(name)
            vm.problems = tuple(str(problem) for problem in broken.get(name, ()))
            vm.configured = True
        for vm in list(self._vms.values()):
            if vm.name not in names:
                vm.config, vm.configured, vm.problems = None, False, ("its configuration file is gone",)

    def names_in_use(self) -> frozenset[str]:
        """The VMs that are configured, however badly, or still hold something."""
        return frozenset(vm.name for vm in self if vm.configured or vm.is_up or vm.record is not None)

    def drop_gone(self) -> list[str]:
        """Remove and name the VMs that are neither configured nor running."""
        gone = [
            vm.name for vm in self._vms.values() if not vm.configured and not vm.is_up and vm.record is None
        ]
        for name in gone:
            del self._vms[name]
        return gone
