"""The life of every VM as users see it: start, stop, run, and what changes by itself.

Wired up by vmsilod's main; called by the bus, by systemd's signals, by the relay's events and by the
configuration watch, all on the GLib loop. Every start ends in a start of the VM's unit, whoever asked. It
keeps no truth of its own that is not also in systemd (processes) or in a record file (leases), so that it
can be killed at any moment and go on from there.
"""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from vmsilod import closing, loop, ssh_login
from vmsilod.bus.views import Reloaded, VmRemoved, printable
from vmsilod.disks import Disks
from vmsilod.errors import Busy, ConfigBroken, Denied, Failed, NotRunning, StartFailed, Timeout, VmsiloError
from vmsilod.host import find_uid
from vmsilod.hotplug import attach_interface, detach_interface, find_detached
from vmsilod.killing import end_run
from vmsilod.memory import read_memory, resize_memory
from vmsilod.spawning import send_frame, spawn_frame
from vmsilod.systemd import INACTIVE
from vmsilod.vm_view import view_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmsilod.bus.requests import RunRequest, SshRequest
    from vmsilod.bus.views import Change, DisposableDomain, NetworkView, VmView
    from vmsilod.holders import Holders
    from vmsilod.pci.ledger import PciView
    from vmsilod.publication import Publication
    from vmsilod.registry import Registry, Vm
    from vmsilod.runs import Runs
    from vmsilod.systemd import Systemd

log = logging.getLogger(__name__)

DEFAULT_START_SECONDS = 180.0
DISCARD_SECONDS = 2.0
KILL_SECONDS = 0.2  # systemd has the stop under way by then
REFRESH_AGAIN = (1.0, 5.0, 25.0)  # seconds


class Lifecycle:
    """`bus.service.Domain` over the registry; tells each subscriber of every change."""

    def __init__(
        self, registry: Registry, systemd: Systemd, holders: Holders, runs: Runs, publication: Publication
    ) -> None:
        self.usb = holders.usb
        self.disks = Disks(registry, lambda: runs.relay)
        self._registry = registry
        self._endings = holders.endings
        self._pci = holders.pci
        self._network = holders.network
        self._systemd = systemd
        self._runs = runs
        self._publication = publication
        self._disposables: DisposableDomain | None = None
        self._subscribers: list[Callable[[Change], None]] = []
        self._refreshing: set[str] = set()
        self._stale: set[str] = set()

    # What the bus asks

    @property
    def disposables(self) -> DisposableDomain:
        if self._disposables is None:
            raise Busy("vmsilod is still starting", "try again")
        return self._disposables

    def use_disposables(self, disposables: DisposableDomain) -> None:
        self._disposables = disposables

    def subscribe(self, callback: Callable[[Change], None]) -> Callable[[], None]:
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def list_vms(self) -> list[VmView]:
        return [view_of(vm) for vm in self._registry]

    async def start(self, name: str, *, wait: bool) -> None:
        vm = self._registry.require(name)
        if vm.config is None and not vm.is_up:
            raise ConfigBroken(f"VM '{name}' is disabled: {'; '.join(vm.problems)}", "vmsilo check")
        await self._endings.cancel(vm)
        told = self._endings.find_told(vm)
        result = await self._systemd.start(vm.service)
        await self._refresh(vm)
        self._check_start(vm, vm.service, result, told)
        if wait:
            await self._await_ready(vm)

    async def stop(self, name: str, timeout: int | None) -> None:
        vm = self._registry.require(name)
        started = vm.started
        if timeout is not None and started is not None:
            timeout = min(timeout, started.stop_timeout)  # the unit's TimeoutStopSec= is made for that one
            vm.stop_deadline = timeout
        await self._endings.cancel(vm)
        try:
            for unit in (vm.service, vm.debug_service) if vm.debug else (vm.service,):
                result = await self._systemd.stop(unit)
                if result == "canceled":
                    raise Busy(f"somebody started VM '{name}' while it was to be stopped", "try again")
                if result != "done":
                    raise Failed(f"the stop of {unit} was not carried out: systemd says '{result}'")
            await self._settle(vm)
        finally:
            vm.stop_deadline = None
            await self._endings.cancel(vm)  # it may have crashed as the stop began

    async def kill(self, name: str) -> None:
        await self._end(name, KILL_SECONDS)

    async def discard(self, name: str) -> None:
        """As kill, but not so that its unit ends as failed. A run that ended unseen is settled too."""
        await self._end(name, DISCARD_SECONDS)
        await self._settle(self._registry.require(name))

    async def _end(self, name: str, grace: float) -> None:
        vm = self._registry.require(name)
        await self._endings.cancel(vm)
        try:
            if await end_run(self._systemd, self._endings, vm, grace):
                await self._settle(vm)
        finally:
            await self._endings.cancel(vm)

    async def restart(self, name: str, timeout: int | None) -> None:
        await self.stop(name, timeout)
        await self.start(name, wait=True)

    async def run(self, request: RunRequest) -> int:
        """The descriptor of a connection on which the agent already has the command."""
        vm = self._registry.require(request.name)
        frame = spawn_frame(request)
        await self._bring_up(vm, may_start=request.start)
        refuse_new_owner(vm, request.uid)
        fd = await self._runs.relay.connect(vm.name, "root" if request.root else "user")
        try:
            await loop.in_worker(send_frame, fd, frame)
        except BaseException:
            os.close(fd)
            raise
        return fd

    async def read_memory(self, name: str) -> dict[str, int]:
        return await read_memory(self._registry.require(name))

    async def resize_memory(self, name: str, size: int) -> dict[str, int]:
        return await resize_memory(self._registry.require(name), size)

    async def read_network(self, name: str) -> list[NetworkView]:
        detached = find_detached(self._registry.require(name))
        # What the file gave to a VM that runs without any interface has its TAP already.
        views = await self._network.find_views(name)
        return [view for view in views if view.interface not in {d.interface for d in detached}] + detached

    async def attach_interface(self, name: str, interface: str) -> None:
        vm = self._registry.require(name)
        await attach_interface(vm, self._network, self._runs.relay, interface)
        self.changed(vm)

    async def detach_interface(self, name: str, interface: str) -> None:
        vm = self._registry.require(name)
        try:
            await detach_interface(vm, self._network, interface)
        finally:
            self.changed(vm)

    async def open_ssh(self, request: SshRequest) -> tuple[int, int, str, str]:
        """What a login by ssh needs: connection and private key (descriptors), the login, the host key."""
        vm = self._registry.require(request.name)
        await self._bring_up(vm, may_start=request.start)
        refuse_new_owner(vm, request.uid)
        return await ssh_login.open_login(vm, request, self._runs.relay)

    async def _bring_up(self, vm: Vm, *, may_start: bool) -> None:
        if not vm.is_up:
            if not may_start:
                raise NotRunning(f"VM '{vm.name}' is not running", f"vm-start {vm.name}")
            await self.start(vm.name, wait=False)
        await self._await_ready(vm)

    async def reload(self) -> list[str]:
        return [str(problem) for problem in await self._publication.reload()]

    async def check(self) -> list[dict[str, str]]:
        return await self._publication.check()

    async def find_pci(self) -> list[PciView]:
        return await self._pci.find_views()

    async def claim_pci(self, address: str) -> None:
        await self._pci.claim(address)

    async def release_pci(self, address: str) -> str:
        return await self._pci.give_back(address)

    async def start_debug(self, name: str, fds: Sequence[int]) -> str:
        """Start the VM in its debug unit with its console on `fds` (three; ours from here on)."""
        terminals = self._runs.debug_terminals
        try:
            vm = self._registry.require(name)
            if vm.is_up or name in terminals:
                raise StartFailed(f"VM '{name}' is running", f"vm-stop {name}")
            if vm.config is None:
                raise ConfigBroken(f"VM '{name}' is disabled: {'; '.join(vm.problems)}", "vmsilo check")
            terminals[name] = [os.dup(fd) for fd in fds]
        finally:
            closing.close_later(f"terminal of {name}", fds)
        vm.debug = True
        told = self._endings.find_told(vm)
        await self._endings.cancel(vm)
        result = "failed"
        try:
            result = await self._systemd.start(vm.debug_service)
        finally:
            closing.close_later(f"terminal of {name}", terminals.pop(name, []))
            await self._refresh(vm)
            if result != "done":
                await self._restore_socket(vm)
        self._check_start(vm, vm.debug_service, result, told)
        return vm.debug_service

    # What happens by itself

    def unit_changed(self, unit: str) -> None:
        """systemd reported a change of a VM's unit."""
        vm = self._find_by_unit(unit)
        if vm is None:
            self._runs.shares.unit_changed(unit)
            return
        if vm.name in self._refreshing:
            self._stale.add(vm.name)
        else:
            self._refresh_later(vm)

    def relay_event(self, event: dict[str, Any]) -> None:
        """The guest of a VM said something to the relay, which has checked it."""
        vm = self._registry.find(event["name"])
        if vm is None or vm.record is None or vm.record.invocation != event["generation"]:
            return
        kind = event["event"]
        if kind == "agent":
            vm.agent = True
        elif kind == "ready" and not vm.ready:
            vm.ready = True
            if vm.was_ready:
                self.changed(vm)
                return
            vm.was_ready = True
            seconds = time.time() - vm.unit.active_since / 1e6
            log.info("VM %s: guest ready %.1f s after its VMM", vm.name, seconds)
        elif kind == "down":
            vm.agent = vm.ready = False
        elif kind == "status":
            # The relay has checked it; but it goes to systemd, where a line feed begins a new assignment.
            vm.status = printable(str(event.get("text", "")))
        self.changed(vm)

    def changed(self, vm: Vm) -> None:
        """Tell the bus, `systemctl status`, and whoever waits for this VM."""
        self._publication.show_status(vm)
        waiters, vm.waiters = vm.waiters, []
        for waiter in waiters:
            waiter.set_result(None)
        if self._registry.find(vm.name) is vm:  # a refresh under way may outlast its VM
            self._tell(view_of(vm))

    def _tell(self, change: Change) -> None:
        for callback in list(self._subscribers):
            callback(change)

    async def refresh_all(self) -> None:
        for vm in self._registry:
            await self._refresh(vm)

    def configuration_applied(self, problems: int | None = None) -> None:
        """Report VMs that came, changed or went; `problems` counts those of a configuration that was just
        read.
        """
        if problems is not None:
            self._tell(Reloaded(len(list(self._registry)), problems))
        self.drop_gone()
        for vm in self._registry:
            self.changed(vm)

    def drop_gone(self) -> None:
        """VMs that are neither configured nor running are no VMs any more."""
        for name in self._registry.drop_gone():
            loop.spawn(self._endings.forget(name))
            self._tell(VmRemoved(name))

    async def _refresh(self, vm: Vm) -> None:
        """Take over what systemd says now; when a run has ended, explain it and give back its leases."""
        try:
            await self._catch_up(vm)
        except VmsiloError:
            self._refresh_later(vm)
            raise

    def _refresh_later(self, vm: Vm) -> None:
        """Nobody waits for it, and systemd says each change once."""
        loop.spawn(loop.insist(partial(self._catch_up, vm), REFRESH_AGAIN, f"VM {vm.name}"))

    async def _catch_up(self, vm: Vm) -> None:
        self._refreshing.add(vm.name)
        try:
            again = True
            while again:
                self._stale.discard(vm.name)
                await self._take_over(vm)
                again = vm.name in self._stale
        finally:
            self._refreshing.discard(vm.name)

    async def _take_over(self, vm: Vm) -> None:
        was_up = vm.is_up
        vm.unit = await self._systemd.state(vm.debug_service if vm.debug else vm.service)
        if was_up and not vm.is_up and vm.preparing:
            vm.prepared = time.monotonic_ns() // 1000  # nobody waits any more for what is being prepared
        if not vm.is_up and (vm.record is not None or vm.unit.active == "failed"):
            await self._endings.tell(vm)
        run = vm.unit.invocation or (vm.record.invocation if vm.record is not None else "")
        killed, debug = not vm.is_up and bool(run) and vm.killing == run, False
        if not vm.is_up and vm.record is not None:
            debug = vm.debug
            await self._runs.release(vm)
        if (killed or debug) and vm.unit.active == "failed":
            await self._systemd.reset_failed(vm.debug_service if debug else vm.service)
        if killed:
            vm.unit = INACTIVE
        if debug:
            await self._restore_socket(vm)
        self.changed(vm)
        if was_up and not vm.is_up and not vm.is_instance:  # an instance goes, or its keeper says why not
            await self._publication.publish_stopped(vm)
            self.configuration_applied()

    def _check_start(self, vm: Vm, unit: str, result: str, told: str) -> None:
        """`told` is what find_told said before the start. StartFailed unless it is done."""
        if result != "done":
            reason = (self._endings.find_told(vm) != told and vm.last_result) or f"systemd says '{result}'"
            raise StartFailed(f"VM '{vm.name}' failed to start: {reason}", f"journalctl -u {unit}")

    async def _settle(self, vm: Vm) -> None:
        """After a stop: return only when the leases are back and the state says so."""
        await self._refresh(vm)
        async with vm.lock:
            pass

    async def _restore_socket(self, vm: Vm) -> None:
        vm.debug = False
        if vm.config is not None:
            await self._systemd.start(vm.socket)

    async def _await_ready(self, vm: Vm) -> None:
        started = vm.started
        limit = float(started.start_timeout) if started is not None else DEFAULT_START_SECONDS
        deadline = time.monotonic() + limit
        while not vm.ready:
            if not vm.is_up:
                reason = vm.last_result or "it stopped"
                raise StartFailed(f"VM '{vm.name}' failed to start: {reason}", f"journalctl -u {vm.service}")
            waiter: Future[None] = Future()
            vm.waiters.append(waiter)
            try:
                await loop.with_deadline(waiter, max(0.0, deadline - time.monotonic()))
            except TimeoutError as error:
                if waiter in vm.waiters:
                    vm.waiters.remove(waiter)
                raise Timeout(
                    f"the guest of VM '{vm.name}' was not ready within {limit:.0f} s",
                    f"sudo vm-start-debug {vm.name} shows its console",
                ) from error

    def _find_by_unit(self, unit: str) -> Vm | None:
        for suffix in ("-vm.service", "-debug.service"):
            if unit.startswith("vmsilo-") and unit.endswith(suffix):
                return self._registry.find(unit.removeprefix("vmsilo-").removesuffix(suffix))
        return None


def refuse_new_owner(vm: Vm, uid: int) -> None:
    """polkit's rule names the owner of today; what runs in the VM belongs to the one it was started for."""
    started = vm.started
    if uid == 0 or started is None or (vm.config is not None and vm.config.user == started.user):
        return
    if uid != find_uid(started.user):
        raise Denied(f"VM '{vm.name}' still runs for the user '{started.user}'", f"vm-stop {vm.name}")
