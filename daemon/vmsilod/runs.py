"""One run of a VM: leases acquired when its unit starts, the guest asked to go when it stops, everything
given back after.

Called by the lifecycle (release, repair) and, as `control.Handler`, by the launchers. Per VM these steps
follow one another under the VM's lock. The record on disk is written before the first lease is taken and
removed after the last is given back.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from vmsilod import closing, disk_plans, loop, preparation
from vmsilod.consoles import console_of, split_passed
from vmsilod.control import Peer, Prepared
from vmsilod.disk_claims import hold_disks
from vmsilod.errors import BadRequest, ConfigBroken, StartFailed, VmsiloError
from vmsilod.forwards import Forwards
from vmsilod.host import find_uid, probe_host
from vmsilod.interfaces import open_interfaces
from vmsilod.network.guest import plan_guest_files
from vmsilod.relay_agreement import agree_with_relay
from vmsilod.resources import record as records
from vmsilod.resources import rundir, vsock
from vmsilod.resources.disks import PLAIN_OVERLAY, has_plain_overlay
from vmsilod.resources.image import pin_version
from vmsilod.resources.record import Record
from vmsilod.shapes import is_root_pmem, leases_of, request_of, shape_of
from vmsilod.shares import Shares
from vmsilod.units.render import vsock_unit
from vmsilod.vmm import drivers
from vmsilod.vmm.choose import TCG_WARNING, VmmKind, choose_vmm
from vmsilod.vmm.errors import MonitorError
from vmsilod.waiting import Lock

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmsilod.config.model import VmConfig
    from vmsilod.holders import Holders
    from vmsilod.registry import Registry, Vm
    from vmsilod.relay_client import RelayClient
    from vmsilod.systemd import Systemd

log = logging.getLogger(__name__)


class Runs:
    """Leases of all running VMs."""

    def __init__(
        self, registry: Registry, systemd: Systemd, holders: Holders, on_change: Callable[[Vm], None]
    ) -> None:
        self._registry = registry
        self._systemd = systemd
        self._consoles = holders.consoles
        self._endings = holders.endings
        self._pci = holders.pci
        self._network = holders.network
        self._hugepages = holders.hugepages
        self._on_change = on_change
        self._relay: RelayClient | None = None
        self._vsock_listening = False
        self._vsock_lock = Lock()
        self._forwards = Forwards(registry, systemd, lambda: self.relay)
        self.forward = self._forwards.answer
        self.shares = Shares(registry, systemd)
        self.share = self.shares.answer
        self.debug_terminals: dict[str, list[int]] = {}

    def use_relay(self, relay: RelayClient) -> None:
        self._relay = relay

    @property
    def relay(self) -> RelayClient:
        if self._relay is None:
            raise StartFailed("vmsilod is not connected to its relay yet", "try again")
        return self._relay

    async def prepare(self, peer: Peer, fds: list[int]) -> Prepared:
        """Everything the launcher of this unit run executes.

        systemd says who the launcher is: the main process of a unit that is still starting. A VMM is in the
        same cgroup, under the same uid, but its unit has started, so it gets nothing.
        """
        vm = self._registry.require(peer.name)
        vm.preparing += 1
        before = vm.prepared
        try:
            await self._endings.admit(vm, peer.unit, peer.pid)
            return await self._prepare_locked(vm, peer, fds)
        finally:
            vm.preparing -= 1
            if vm.prepared == before:
                vm.prepared = time.monotonic_ns() // 1000
            self._on_change(vm)

    async def _prepare_locked(self, vm: Vm, peer: Peer, fds: list[int]) -> Prepared:
        async with vm.lock:
            state = await self._systemd.state(peer.unit)
            if state.active != "activating" or state.main_pid != peer.pid:
                raise BadRequest(f"process {peer.pid} is not the starting main process of {peer.unit}")
            if vm.record is not None:
                # Of an ended run; or of this one, when the last vmsilod died before it answered. Then the
                # relay keeps the VM with the clients that wait for it, until it is registered anew.
                await self._release(vm, again=vm.record.invocation == state.invocation)
            try:
                vm.debug = peer.unit == vm.debug_service
                if vm.debug and vm.name not in self.debug_terminals:
                    raise StartFailed(
                        f"{peer.unit} has no terminal", f"start it by: vm-start-debug {vm.name}"
                    )
                if vm.config is None:
                    raise ConfigBroken(
                        f"VM '{vm.name}' is disabled: {'; '.join(vm.problems)}", "vmsilo check"
                    )
                return await self._prepare(vm, vm.config, peer, state.invocation, fds)
            except VmsiloError as error:
                await self._abandon(vm, state.invocation)
                await self._endings.start_failed(vm, state.invocation, error)
                raise
            except BaseException:
                await self._abandon(vm, state.invocation)
                raise

    async def _prepare(
        self, vm: Vm, config: VmConfig, peer: Peer, invocation: str, fds: list[int]
    ) -> Prepared:
        host = await loop.in_worker(probe_host)
        # The VMM that the unit was written for: crosvm could not live in the sandbox of QEMU's.
        choice = choose_vmm(vm.vmm or config.vmm, kvm=host.kvm.usable, grows=config.memory_max is not None)
        driver = drivers.DRIVERS[choice.kind]
        if not driver.builtin_vsock:
            host.require_vsock()
        hybrid = host.hybrid and not driver.builtin_vsock
        vm.record = Record(
            name=vm.name,
            unit=peer.unit,
            invocation=invocation,
            vmm=choice.kind.value,
            uid=peer.uid,
            cid=0,
            hybrid=hybrid,
            config=config.to_json(),
        )
        await loop.in_worker(records.save_record, vm.record)
        request = request_of(config, peer, choice.kind, host)
        boot = await loop.in_worker(pin_version, request.boot)
        request = dataclasses.replace(request, boot=boot)
        await self._pci.start(vm.name, peer.uid, [device.path for device in config.pci_devices])
        interfaces = await open_interfaces(self._network, vm.name, choice.kind, peer.pid)
        held, terminals = interfaces.fds(), list[int]()
        try:
            mounts = await self.shares.plan(config, request)
            files = plan_guest_files(interfaces.ports) | disk_plans.plan_guest_files(config) | mounts
            request = dataclasses.replace(request, guest_files=files)
            request = await self._hugepages.lease(vm, config, request)
            held += request.fds()
            acquired = await loop.in_patient_worker(preparation.acquire, request)
            held += acquired.fds()
            await hold_disks(
                self._registry,
                vm,
                acquired,
                root_writable=not config.root_disk_readonly,
                root_pmem=is_root_pmem(config, acquired, choice.kind),
            )
            listeners, journal = split_passed(fds)
            if vm.debug:
                terminals = self.debug_terminals.pop(vm.name, [])
            else:
                terminals = await self._consoles.open(vm.name, invocation, journal)
            if acquired.device_fd is not None:
                vm.cid_fd = os.dup(acquired.device_fd)
            if not driver.builtin_vsock:
                await self._connect_channel(vm, acquired, peer.unit)
            await self._register(vm, config, peer, acquired, listeners)
            await self._forwards.open(vm, config)
            shared = await self.shares.open(vm, acquired, request)
            held += [device.fd for device in shared]
            planned = driver.plan_launch(
                shape_of(config, interfaces.ports),
                dataclasses.replace(
                    leases_of(config, peer, acquired, choice.kind, host),
                    nets=interfaces.nets,
                    shares=shared,
                ),
                console=console_of(vm, terminals),
                binary=choice.binary,
            )
            if choice.kind is VmmKind.QEMU and not host.kvm.usable:
                log.warning("VM %s: %s (%s)", vm.name, TCG_WARNING, host.kvm.reason)
            if has_plain_overlay(acquired.disks):
                fields = {"OBJECT_SYSTEMD_UNIT": peer.unit}
                log.info("VM %s: %s", vm.name, PLAIN_OVERLAY, extra=fields)
            vm.record = dataclasses.replace(
                vm.record,
                cid=acquired.cid,
                launched=True,
                login=acquired.files.login,
                version=acquired.files.version,
                guest_uid=config.guest_id or acquired.files.uid,
            )
            await loop.in_worker(records.save_record, vm.record)
        except BaseException:
            for fd in held:
                os.close(fd)
            closing.close_later(f"terminal of {vm.name}", terminals)
            raise
        self._endings.watch(vm)
        self._on_change(vm)
        passed = (*planned.fds, *terminals)
        stdio = tuple(range(len(planned.fds), len(passed)))
        with_terminals = dataclasses.replace(planned, fds=passed)
        return Prepared(with_terminals, stdio, (*held, *terminals))

    async def _connect_channel(self, vm: Vm, acquired: preparation.Acquired, unit_of_vm: str) -> None:
        if acquired.device_fd is not None:
            async with self._vsock_lock:  # of VMs that start together one binds the port
                if not self._vsock_listening:
                    listener = await loop.in_worker(vsock.bind_host_port)
                    try:
                        await self.relay.listen_vsock(listener)
                    finally:
                        os.close(listener)
                    self._vsock_listening = True
            return
        unit = vsock_unit(unit_of_vm)
        result = await self._systemd.start_bound(unit)
        if result != "done":
            raise StartFailed(f"the vsock device of VM '{vm.name}' did not start", f"journalctl -u {unit}")
        assert vm.record is not None
        if vm.killing == vm.record.invocation:  # it is gone already
            raise StartFailed(f"VM '{vm.name}' was killed while it started")
        await loop.in_worker(preparation.await_socket, acquired.rundir / "vsock" / "vhost")

    async def _register(
        self, vm: Vm, config: VmConfig, peer: Peer, acquired: preparation.Acquired, fds: list[int]
    ) -> None:
        names = ["command"] if fds else []
        passed = list(fds[:1])
        if acquired.host_port_fd is not None:
            names.append("host-port")
            passed.append(acquired.host_port_fd)
        assert vm.record is not None
        await self.relay.add(
            {
                "name": vm.name,
                "generation": vm.record.invocation,
                "secret": acquired.secret,
                "owner": find_uid(config.user),
                "channel": acquired.channel(peer.uid),
                "start_timeout": config.start_timeout,
                "fds": names,
            },
            passed,
        )

    async def shut_down(self, peer: Peer) -> dict[str, Any]:
        """ExecStop=: ask the guest to go, by its agent or by the power button. The configuration is the
        started one.
        """
        vm = self._registry.require(peer.name)
        if (await self._systemd.state(peer.unit)).active != "deactivating":
            raise BadRequest(f"unit {peer.unit} is not stopping")
        if vm.record is None or vm.killing == vm.record.invocation:
            return {"ok": True, "force": True}
        await self._endings.mark_stopping(vm)
        asked = await self._ask_agent(vm) or await self._press_power_button(vm)
        started = vm.started
        assert started is not None
        deadline = vm.stop_deadline if vm.stop_deadline is not None else started.stop_timeout
        return {"ok": True, "force": not asked, "deadline": deadline}

    async def _ask_agent(self, vm: Vm) -> bool:
        if not vm.agent:
            return False
        try:
            await self.relay.power_off(vm.name)
        except VmsiloError as error:
            log.info("VM %s: the agent does not take a shutdown (%s)", vm.name, error)
            return False
        return True

    async def _press_power_button(self, vm: Vm) -> bool:
        assert vm.record is not None
        driver = drivers.DRIVERS[VmmKind(vm.record.vmm)]
        monitor = driver.open_monitor(rundir.VM_DIR / vm.name / "monitor.sock")
        try:
            await loop.in_worker(monitor.power_button)
        except MonitorError as error:
            log.info("VM %s: no power button (%s)", vm.name, error)
            return False
        return True

    async def release(self, vm: Vm) -> None:
        """Give back what the ended run held, unless a newer run holds it by now."""
        async with vm.lock:
            if vm.record is None:
                return
            state = await self._systemd.state(vm.record.unit)
            if state.is_up and state.invocation == vm.record.invocation:
                return
            await self._release(vm)

    async def _abandon(self, vm: Vm, invocation: str) -> None:
        await self._forget_in_relay(vm.name, invocation)
        await self._release(vm)

    async def _forget_in_relay(self, name: str, generation: str) -> None:
        if self._relay is None:
            return
        try:
            await self._relay.remove(name, generation)
        except VmsiloError as error:
            # What the relay has and we have not is removed when we meet it again: agree_with_relay().
            log.warning("VM %s: the relay did not take the removal (%s)", name, error)

    async def _release(self, vm: Vm, *, again: bool = False) -> None:
        record = vm.record
        await self._forwards.close(vm)
        await self.shares.close(vm)
        if record is not None and not again:
            await self._forget_in_relay(vm.name, record.invocation)
            await self._consoles.close(vm.name, record.invocation)
        # Only now may anybody take the CID: while the relay knew it, its new owner would have passed for the
        # VM.
        cid_fd, vm.cid_fd = vm.cid_fd, None
        if cid_fd is not None:
            os.close(cid_fd)
        if record is not None and record.hybrid:
            await self._stop_vsock(vm.name, record.unit)
        await self._remove_rundir(vm.name)
        await self._pci.end(vm.name)
        await self._network.close(vm.name)
        await loop.in_worker(records.forget_record, vm.name)
        vm.forget_run()
        if record is not None:
            await self._hugepages.release(record)
        self._on_change(vm)

    async def _stop_vsock(self, name: str, unit_of_vm: str) -> None:
        try:
            await self._systemd.stop(vsock_unit(unit_of_vm))
        except VmsiloError as error:
            log.info("VM %s: %s", name, error)

    async def repair(self) -> None:
        """At start: keep the leases of VMs that systemd says run, give back all others, make the relay
        agree.
        """
        for name, record in (await loop.in_worker(records.load_records)).items():
            try:
                await self._adopt(self._registry.adopt(name), record)
            except VmsiloError as error:
                # One VM's leftovers must not keep the daemon of all others from starting.
                log.error("VM %s: cannot be repaired: %s", name, error)
        running = [vm for vm in self._registry if vm.record is not None]
        await self._pci.repair([vm.name for vm in running])
        await self._network.repair({vm.name: vm.started_as for vm in running})
        await self._hugepages.repair()
        for path in rundir.VM_DIR.glob("*") if rundir.VM_DIR.is_dir() else ():
            vm = self._registry.find(path.name)
            if vm is None or vm.record is None:
                await self._remove_rundir(path.name)

    async def _adopt(self, vm: Vm, record: Record) -> None:
        vm.record = record
        # Before the state is read, and whether or not its units will be written again: its end is ours
        # to see.
        self._systemd.follow(vm.service)
        self._systemd.follow(vm.debug_service)
        vm.unit = await self._systemd.state(record.unit)
        vm.debug = record.unit == vm.debug_service
        if not vm.unit.is_up or vm.unit.invocation != record.invocation:
            log.info("VM %s: giving back what an ended run left", vm.name)
            await self._endings.tell(vm)
            async with vm.lock:
                await self._release(vm)
            return
        await self.shares.watch(vm)

    async def _remove_rundir(self, name: str) -> None:
        try:
            await loop.in_worker(rundir.remove_rundir, name)
        except VmsiloError as error:
            log.error("VM %s: %s", name, error)

    async def agree_with_relay(self) -> None:
        """After each (re)connection."""
        self._vsock_listening = await agree_with_relay(self.relay, self._registry, self._on_change)
