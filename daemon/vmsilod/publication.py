"""Makes the configuration real: reads it, writes the VMs' units below /run/systemd/system, keeps the polkit
rule in step.

Called by main at start, by the watch after a change and by the bus for Reload. One daemon-reload per change,
none when nothing changed. A VM that is up keeps its units until it has stopped.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from systemd import daemon
from vmsilod import loop
from vmsilod.bus import rules
from vmsilod.config.load import load_configuration
from vmsilod.config.network_checks import SYS_NET
from vmsilod.config.schema import RESERVED_NAMES
from vmsilod.errors import VmsiloError
from vmsilod.host import LIBDIR, Host, find_uid, probe_host
from vmsilod.resources import ssh_keys
from vmsilod.resources.shares import hand_over_places
from vmsilod.resources.vsock import HYBRID_CID
from vmsilod.units import files as unit_files
from vmsilod.units.render import RenderedUnits, UnitContext, UnitPaths, command_socket, render_units
from vmsilod.vmm.choose import VmmKind, choose_vmm
from vmsilod.vmm.drivers import DRIVERS
from vmsilod.vmm.errors import KvmNeeded, MissingVmm
from vmsilod.waiting import Lock

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmsilod.config.load import Configuration
    from vmsilod.config.model import VmConfig
    from vmsilod.config.problems import Problem
    from vmsilod.network.pool import NetworkPool
    from vmsilod.pci.claims import PciClaims
    from vmsilod.registry import Registry, Vm
    from vmsilod.systemd import Systemd

log = logging.getLogger(__name__)

AUTOSTART_TARGET = "vmsilo-vms.target"
BOOTED_MARK = Path("/run/vmsilo/state/booted")


class Publication:
    """What is published of the registry; `on_applied(problems)` runs after each configuration that was
    taken over.
    """

    def __init__(self, registry: Registry, systemd: Systemd, pci: PciClaims, network: NetworkPool) -> None:
        self._registry = registry
        self._pci = pci
        self._network = network
        self._systemd = systemd
        self._lock = Lock()
        self.on_applied: Callable[[int], None] = lambda _problems: None
        self.amend: Callable[[Configuration], Configuration] = lambda configuration: configuration
        self._shown: dict[str, str] = {}
        self._published = False
        self._awaited: frozenset[str] = frozenset()
        self._owed: set[str] = set()  # VMs that were broken when those with auto_start were started

    async def reload(self) -> list[Problem]:
        """Read everything again and take it over; returns what is wrong with it."""
        async with self._lock:
            host = await loop.in_worker(probe_host)
            configuration = self.amend(await loop.in_worker(load_configuration))
            self._registry.apply(configuration)
            self._awaited = configuration.awaited
            self._owed -= configuration.vms.keys()
            # At once: whoever starts now waits for it. TAPs are there before a unit can want them.
            await self._network.apply(
                configuration.settings,
                {name: with_vmm(config, host) for name, config in configuration.vms.items()},
            )
            for problem in configuration.problems:
                log.warning("%s", problem)
            await loop.in_worker(apply_rules, configuration)
            if configuration.settings is not None:
                await loop.in_worker(hand_over_places, configuration.settings.user)
            await self._publish(configuration)
        if configuration.settings is not None:  # a broken file gives nothing to the host
            await self._pci.isolate(configuration.settings.isolated_pci_devices)
        self.on_applied(len(configuration.problems))
        return list(configuration.problems)

    def links_touched(self) -> None:
        """A network device came, went or changed; a VM may have waited for it."""
        awaited = self._awaited
        if any((SYS_NET / device).exists() for device in awaited):
            self._awaited = frozenset()
            loop.spawn(self._admit_late(awaited))

    async def _admit_late(self, awaited: frozenset[str]) -> None:
        owed = set(self._owed)
        try:
            await self.reload()
        except VmsiloError:
            self._awaited = awaited
            raise
        for vm in self._registry:
            if vm.name not in owed or vm.config is None or not vm.config.auto_start or vm.is_up or vm.debug:
                continue
            try:
                await self._systemd.start(vm.service)
            except VmsiloError as error:
                log.error("VM %s: %s", vm.name, error)

    async def check(self) -> list[dict[str, str]]:
        configuration = await loop.in_worker(load_configuration)
        return [
            {"file": p.file, "key": p.key, "message": p.fact, "hint": p.hint, "vm": p.vm or ""}
            for p in configuration.problems
        ]

    async def publish_stopped(self, vm: Vm) -> None:
        """A VM has stopped: its units may follow its configuration now."""
        async with self._lock:
            await self._publish(None, only=vm.name)

    async def add(self, vm: Vm) -> None:
        """One VM more, whose units nothing refers to: that takes no reload, and no look at others."""
        assert vm.config is not None
        async with self._lock:
            host = await loop.in_worker(probe_host)
            context = context_for(vm.config, host)
            vm.vmm = context.vmm
            await self._network.add(vm.name, with_vmm(vm.config, host))
            await loop.in_worker(unit_files.add_units, render_units(vm.config, context))
            await self._publish_socket(vm.name, changed=False)

    async def close(self, vm: Vm) -> None:
        """Nobody is to start it any more."""
        async with self._lock:
            await self._systemd.stop(vm.socket)

    async def remove(self, vm: Vm) -> None:
        """What `add` has made of it; its run has ended."""
        async with self._lock:
            await self._systemd.stop(vm.socket)
            await loop.in_worker(unit_files.remove_units, vm.name)
            for unit in (vm.service, vm.debug_service):
                await self._systemd.reset_failed(unit)
                self._systemd.unfollow(unit)
            await self._network.remove(vm.name)
            self._shown.pop(vm.name, None)

    async def start_autostart_vms(self) -> None:
        """Once per boot, after the first publication."""
        if BOOTED_MARK.exists():
            return
        BOOTED_MARK.touch()
        self._owed = {vm.name for vm in self._registry if vm.config is None}
        await self._systemd.start(AUTOSTART_TARGET)

    def show_status(self, vm: Vm) -> None:
        """The guest's state in `systemctl status` of the VM's unit: NotifyAccess=main, so in the VMM's
        name.
        """
        text = "guest ready" if vm.ready else f"guest not ready: {vm.status or 'no word from it yet'}"
        if vm.unit.active != "active" or not vm.unit.main_pid or self._shown.get(vm.name) == text:
            return
        self._shown[vm.name] = text
        try:
            daemon.notify(f"STATUS={text}", pid=vm.unit.main_pid)
        except OSError as error:
            log.debug("ignoring: no status for %s: %s", vm.name, error.strerror)

    async def _publish(self, configuration: Configuration | None, only: str | None = None) -> None:
        host = await loop.in_worker(probe_host)
        wanted: dict[str, RenderedUnits] = {}
        for vm in self._registry:
            if vm.config is not None and not vm.is_up and only in (None, vm.name):
                context = context_for(vm.config, host)
                vm.vmm = context.vmm
                wanted[vm.name] = render_units(vm.config, context)
        keep = frozenset(
            vm.name for vm in self._registry if vm.is_up or (only is not None and vm.name != only)
        )
        change = await loop.in_worker(unit_files.write_units, wanted, keep)
        await self._forget(change.removed)
        # Under the lock: no VM can come back in the meantime and make new ones.
        await loop.in_worker(ssh_keys.keep_only, self._registry.names_in_use())
        # The first time always: the last vmsilod may have died between its writing and its reload.
        if change.any or not self._published:
            await self._systemd.reload()
        if not self._published:
            await self._stop_strangers()
        self._published = True
        for name in sorted(wanted):
            try:
                await self._publish_socket(name, changed=f"vmsilo-{name}.socket" in change.changed)
            except VmsiloError as error:
                if await self._is_stopping():
                    log.info("the host shuts down: no command sockets are made any more")
                    return
                # A masked or broken unit of one VM (`systemctl edit`) is that VM's trouble alone.
                log.error("VM %s has no command socket: %s", name, error)

    async def _is_stopping(self) -> bool:
        try:
            return await self._systemd.is_stopping()
        except VmsiloError:
            return False  # then each VM that has no socket says why

    async def _publish_socket(self, name: str, *, changed: bool) -> None:
        vm = self._registry.find(name)
        if vm is None or vm.config is None:
            return
        self._systemd.follow(vm.service)
        self._systemd.follow(vm.debug_service)
        # The VM may have been started since its units were written, and stopping the socket would stop it.
        idle = not (vm.lock.held or vm.debug or (await self._systemd.state(vm.service)).is_up)
        if idle and (changed or not belongs_to(Path(command_socket(name)), vm.config.user)):
            await self._systemd.stop(vm.socket)
        if not vm.debug:
            result = await self._systemd.start(vm.socket)
            if result != "done":
                log.error("socket unit %s did not start: %s", vm.socket, result)

    async def _stop_strangers(self) -> None:
        """Sockets that still listen although no VM has them any more, from before a crash."""
        for unit, active in await self._systemd.find_units("vmsilo-*.socket"):
            name = unit.removeprefix("vmsilo-").removesuffix(".socket")
            if active == "active" and name not in RESERVED_NAMES and self._registry.find(name) is None:
                await self._forget(frozenset({unit}))

    async def _forget(self, removed: frozenset[str]) -> None:
        """Before the reload: systemd keeps a unit without a file as long as it listens or counts as
        failed.
        """
        for name in sorted(removed):
            try:
                if name.endswith(".socket"):
                    await self._systemd.stop(name)
                elif (await self._systemd.state(name)).active == "failed":
                    await self._systemd.reset_failed(name)
            except VmsiloError as error:
                log.error("%s", error)


def belongs_to(path: Path, user: str) -> bool:
    """False for a socket of another user; one that does not exist will be made for the right one."""
    try:
        return path.stat().st_uid == find_uid(user)
    except (OSError, VmsiloError):
        return True


def with_vmm(config: VmConfig, host: Host) -> VmConfig:
    """With what "auto" comes to here."""
    return config.model_copy(update={"vmm": context_for(config, host).vmm})


def context_for(config: VmConfig, host: Host) -> UnitContext:
    """Without a VMM the units are written all the same: the start says what is missing."""
    try:
        kind = choose_vmm(config.vmm, kvm=host.kvm.usable, grows=config.memory_max is not None).kind
    except (MissingVmm, KvmNeeded):
        kind = VmmKind.QEMU if config.vmm == "auto" else VmmKind(config.vmm)
    paths = UnitPaths(libdir=str(LIBDIR))
    if host.hybrid_device:
        paths = dataclasses.replace(paths, vhost_device_vsock=host.hybrid_device)
    return UnitContext(
        owner=config.user,
        vmm=kind.value,
        groups=host.groups,
        hybrid_cid=HYBRID_CID if host.hybrid and not DRIVERS[kind].builtin_vsock else None,
        paths=paths,
    )


def apply_rules(configuration: Configuration) -> None:
    """Blocks. The rule names the user of the configuration; without one nobody but root has a say."""
    try:
        if configuration.settings is None:
            rules.remove_rules()
        else:
            rules.write_rules(rules.render_rules(configuration.settings.user))
    except VmsiloError as error:
        log.error("%s", error)
