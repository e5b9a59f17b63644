"""USB devices in running VMs: attaches, detaches, and makes what is so agree with what is wanted.

Made by main, called by the bus, by the watch and at every change of a VM, on the loop; one step at a time
under its lock. What it holds is in the VMMs (open descriptors) and on disk (state.py), so it can be killed
at any moment: repair() goes on from there. It never binds a host driver by itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmsilod import loop
from vmsilod.bus.views import UsbView, VmView
from vmsilod.errors import BadRequest, Busy, NotRunning, VmsiloError
from vmsilod.resources import rundir
from vmsilod.usb import handover, state
from vmsilod.usb.devices import SYSFS, Key, UsbDevice, find_devices
from vmsilod.usb.rules import Claim, UsbRule, choose_device, find_claim, rule_for
from vmsilod.usb.state import Attachment, UsbRun
from vmsilod.usb.usage import find_obstacles
from vmsilod.vmm import drivers
from vmsilod.vmm.choose import VmmKind
from vmsilod.vmm.errors import MonitorError, MonitorRefused, MonitorUnreachable
from vmsilod.vmm.monitor import UsbMonitor
from vmsilod.waiting import Lock

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmsilod.bus.views import Change
    from vmsilod.registry import Registry, Vm

log = logging.getLogger(__name__)

UNSURE_SECONDS = 5.0
MONITOR_SECONDS = 15.0  # QEMU answers after the device has, whose own requests may take ten


@dataclass(frozen=True)
class _Holder:
    vm: Vm
    run: UsbRun
    attachment: Attachment


@dataclass(frozen=True)
class UsbPlace:
    """Where the kernel shows devices, and where the VMs' monitor sockets and the state are."""

    sysfs: Path = SYSFS
    dev: Path = Path("/dev")
    vm_dir: Path = rundir.VM_DIR
    state_file: Path = state.STATE_FILE


class UsbAttachments:
    """`bus.views.UsbDomain` over sysfs and the VMMs."""

    def __init__(self, registry: Registry, place: UsbPlace | None = None) -> None:
        self._registry = registry
        self._place = place or UsbPlace()
        self._runs: dict[str, UsbRun] = {}
        self._lock = Lock()
        self._failed: set[tuple[str, Key]] = set()
        self._stale = False
        self._unsure: set[str] = set()
        self._states: dict[str, str] = {}

    # What the bus asks

    async def list_devices(self) -> list[UsbView]:
        devices, obstacles = await loop.in_worker(_survey, self._place)
        claims, refused = self._find_claims(), self._find_refused()
        return [self._describe(device, claims, refused, obstacles[device.key]) for device in devices]

    async def attach(self, name: str, untrusted_address: str) -> None:
        vm = self._registry.require(name)
        async with self._lock:
            monitor = self._open_monitor(vm)
            device = choose_device(untrusted_address, await loop.in_worker(find_devices, self._place.sysfs))
            holder = self._find_holder(device)
            if holder is not None and holder.vm is not vm:
                raise Busy(
                    f"VM '{holder.vm.name}' has USB device {device.name}",
                    f"vmsilo usb detach {holder.vm.name} {device.name}",
                )
            self._check_sent(device, vm)
            run = self._run_of(vm)
            if holder is None:
                await self._plug_in(vm, run, monitor, device)
            rule = rule_for(device)
            run.refused = [other for other in run.refused if other != rule]
            run.wanted = [*(other for other in run.wanted if other != rule), rule]
            await self._save()

    async def detach(self, name: str, untrusted_address: str) -> None:
        vm = self._registry.require(name)
        async with self._lock:
            monitor = self._open_monitor(vm)
            run = self._run_of(vm)
            devices = await loop.in_worker(find_devices, self._place.sysfs)
            keys = {attachment.key for attachment in run.attached}
            device = choose_device(untrusted_address, devices, [d for d in devices if d.key in keys])
            attachment = next((entry for entry in run.attached if entry.key == device.key), None)
            if attachment is not None:
                await loop.in_worker(monitor.detach_usb, attachment.handle)
                run.let_go(attachment)
            elif not any(claim.vm == name and claim.rule.matches(device) for claim in self._find_claims()):
                raise BadRequest(f"VM '{name}' does not have USB device {device.name}", "vmsilo usb list")
            rule = rule_for(device)
            run.wanted = [other for other in run.wanted if other != rule]
            run.refused = [*(other for other in run.refused if other != rule), rule]
            await self._save()
            log.info("VM %s: USB device %s (%s) detached on request", name, device.name, device.ids)

    async def release(self, untrusted_address: str) -> None:
        async with self._lock:
            device = choose_device(untrusted_address, await loop.in_worker(find_devices, self._place.sysfs))
            holder = self._find_holder(device)
            if holder is not None:
                raise Busy(
                    f"VM '{holder.vm.name}' has USB device {device.name}",
                    f"vmsilo usb detach {holder.vm.name} {device.name}",
                )
            claim = find_claim(device, self._find_claims(), self._find_refused())
            if claim is not None:
                raise Busy(
                    f"VM '{claim.vm}', which runs, has the rule {claim.rule} for USB device {device.name}",
                    f"vmsilo usb detach {claim.vm} {device.name}",
                )
            self._check_sent(device, None)
            await loop.in_worker(handover.give_to_host, device, self._place.sysfs)
            log.info("USB device %s (%s) given to the host on request", device.name, device.ids)

    # What happens by itself

    def vm_changed(self, change: Change) -> None:
        """A VM started or stopped, or the configuration was read again; devices are dealt with
        afterwards.
        """
        if isinstance(change, VmView):
            if self._states.get(change.name) == change.state:
                return
            self._states[change.name] = change.state
            self._failed = {(vm, key) for vm, key in self._failed if vm != change.name}
        self.refresh()

    def refresh(self) -> None:
        """Look again soon; several calls in a row are one look."""
        if not self._stale:
            self._stale = True
            loop.spawn(self._agree())

    async def load(self) -> None:
        """At start, before anybody asks: what the last vmsilod wrote down of the runs that go on."""
        for name, run in (await loop.in_worker(state.load_state, self._place.state_file)).items():
            vm = self._registry.find(name)
            if vm is not None and vm.record is not None and vm.record.invocation == run.invocation:
                self._runs[name] = run

    async def repair(self) -> None:
        """After load: as far as the VMMs have it, go on with it; unplug what they have beyond."""
        async with self._lock:
            for vm in self._registry:
                if self._is_served(vm) and self._has_controller(vm):
                    await self._repair_vm(vm)
            await self._save()
        self.refresh()

    async def _repair_vm(self, vm: Vm) -> None:
        run = self._run_of(vm)
        try:
            monitor = self._open_monitor(vm)
            listed = {entry.handle: entry for entry in await loop.in_worker(monitor.list_usb)}
            kept = [
                entry
                for entry in run.attached
                if entry.handle in listed and entry.ids.startswith(listed[entry.handle].ids)
            ]
            for handle in listed.keys() - {entry.handle for entry in kept}:
                log.info("VM %s: unplugging USB device %s, of which nothing is known", vm.name, handle)
                await loop.in_worker(monitor.detach_usb, handle)
            for entry in [entry for entry in run.attached if entry not in kept]:
                run.let_go(entry)
            self._unsure.discard(vm.name)
        except VmsiloError as error:
            log.warning("VM %s: its USB devices are not known for sure: %s", vm.name, error)
            self._unsure.add(vm.name)
            loop.call_later(UNSURE_SECONDS, self.refresh)

    async def _agree(self) -> None:
        self._stale = False
        async with self._lock:
            before = state.as_content(self._runs)
            self._forget_ended()
            served = [vm for vm in self._registry if self._is_served(vm) and self._has_controller(vm)]
            if not served:
                if before:
                    await self._save()
                return
            devices = await loop.in_worker(find_devices, self._place.sysfs)
            present = {device.key: device for device in devices}
            self._failed = {(vm, key) for vm, key in self._failed if key in present}
            for vm in served:
                if vm.name in self._unsure:
                    await self._repair_vm(vm)
                await self._check_attached(vm, present)
            for device in devices:
                claim = find_claim(device, self._find_claims(), self._find_refused())
                if claim is not None and device.configured and self._find_holder(device) is None:
                    await self._attach_by_rule(claim, device)
            if before != state.as_content(self._runs):
                await self._save()

    async def _check_attached(self, vm: Vm, present: dict[Key, UsbDevice]) -> None:
        """Unplug what is gone from the host, and keep host drivers off what is there."""
        run = self._run_of(vm)
        run.sent = [key for key in run.sent if key in present]
        for attachment in list(run.attached):
            device = present.get(attachment.key)
            if device is None:
                run.attached.remove(attachment)
                log.info("VM %s: USB device %s (%s) was unplugged", vm.name, attachment.name, attachment.ids)
                with contextlib.suppress(VmsiloError):
                    await self._tidy(self._open_monitor(vm), attachment.handle)
            elif device.host_drivers:
                # A driver that was loaded since takes every device that nobody has claimed yet.
                await loop.in_worker(handover.keep_from_host, device, self._place.sysfs)

    async def _tidy(self, monitor: UsbMonitor, handle: str) -> None:
        """crosvm has noticed that the device is gone, and would log an error; QEMU keeps an empty shell."""
        if any(entry.handle == handle for entry in await loop.in_worker(monitor.list_usb)):
            await loop.in_worker(monitor.detach_usb, handle)

    async def _attach_by_rule(self, claim: Claim, device: UsbDevice) -> None:
        vm = self._registry.find(claim.vm)
        if vm is None or (claim.vm, device.key) in self._failed:
            return
        try:
            self._check_sent(device, vm)
            await self._plug_in(vm, self._run_of(vm), self._open_monitor(vm), device)
        except VmsiloError as error:
            # Tried again when it is plugged in anew or the VM's state changes.
            self._failed.add((claim.vm, device.key))
            log.warning(
                "VM %s: USB device %s (%s) not attached: %s", vm.name, device.name, device.ids, error
            )

    async def _plug_in(self, vm: Vm, run: UsbRun, monitor: UsbMonitor, device: UsbDevice) -> None:
        fd = await loop.in_worker(_take_device, device, monitor.returns_usb_to_host, self._place)
        try:
            label = f"{device.busnum}-{device.devnum}"
            handle = await loop.in_worker(monitor.attach_usb, fd, label)
        except MonitorUnreachable:
            raise
        except MonitorError as error:
            run.mark_sent(device.key)
            if not isinstance(error, MonitorRefused):
                self._unsure.add(vm.name)
                loop.call_later(UNSURE_SECONDS, self.refresh)
            await self._save()
            raise
        finally:
            os.close(fd)
        run.attached.append(Attachment(handle, *device.key, device.ids))
        run.sent = [key for key in run.sent if key != device.key]
        await self._save()
        log.info("VM %s: USB device %s (%s) attached", vm.name, device.name, device.ids)

    # What is known

    def _is_served(self, vm: Vm) -> bool:
        return vm.unit.active == "active" and vm.record is not None and vm.record.launched

    def _has_controller(self, vm: Vm) -> bool:
        started = vm.started
        return started is not None and started.wants_usb

    def _run_of(self, vm: Vm) -> UsbRun:
        assert vm.record is not None
        run = self._runs.get(vm.name)
        if run is None or run.invocation != vm.record.invocation:
            run = self._runs[vm.name] = UsbRun(vm.record.invocation)
        return run

    def _forget_ended(self) -> None:
        for name, run in list(self._runs.items()):
            vm = self._registry.find(name)
            if vm is None or vm.record is None or vm.record.invocation != run.invocation:
                del self._runs[name]
                for entry in run.attached:
                    log.info("USB device %s (%s) of VM %s has no driver now", entry.name, entry.ids, name)

    def _open_monitor(self, vm: Vm) -> UsbMonitor:
        if not self._is_served(vm):
            raise NotRunning(f"VM '{vm.name}' is not running", f"vm-start {vm.name}")
        assert vm.record is not None
        if not self._has_controller(vm):
            raise BadRequest(
                f"VM '{vm.name}' was started without a USB controller",
                f"set usb = true in its configuration and restart it: vm-stop {vm.name}; vm-start {vm.name}",
            )
        driver = drivers.DRIVERS[VmmKind(vm.record.vmm)]
        monitor = driver.open_monitor(self._place.vm_dir / vm.name / "monitor.sock", timeout=MONITOR_SECONDS)
        if not isinstance(monitor, UsbMonitor):
            raise BadRequest(
                f"VM '{vm.name}' runs in {vm.record.vmm}, which takes no USB devices",
                'use vmm = "crosvm" or "qemu", or pass a whole USB controller through (pci_devices)',
            )
        return monitor

    def _find_claims(self) -> list[Claim]:
        claims = []
        for vm in self._registry:
            if not (self._is_served(vm) and self._has_controller(vm)):
                continue
            config = vm.config or vm.started
            since = vm.unit.active_since
            for entry in config.usb_devices if config is not None else ():
                claims.append(Claim(vm.name, UsbRule(entry.vendor, entry.product, entry.serial), since))
            claims += [Claim(vm.name, rule, since, by_hand=True) for rule in self._run_of(vm).wanted]
        return claims

    def _find_refused(self) -> list[tuple[str, UsbRule]]:
        return [(name, rule) for name, run in self._runs.items() for rule in run.refused]

    def _find_holder(self, device: UsbDevice) -> _Holder | None:
        for name, run in self._runs.items():
            vm = self._registry.find(name)
            for attachment in run.attached:
                if attachment.key == device.key and vm is not None and vm.record is not None:
                    return _Holder(vm, run, attachment)
        return None

    def _find_keepers(self, device: UsbDevice) -> list[str]:
        """The running VMs whose VMM was sent this plugging in and may have kept the descriptor."""
        return [name for name, run in self._runs.items() if device.key in run.sent]

    def _check_sent(self, device: UsbDevice, vm: Vm | None) -> None:
        """Whether nobody but `vm` could still use it."""
        others = [name for name in self._find_keepers(device) if vm is None or name != vm.name]
        if others:
            raise Busy(
                f"USB device {device.name} was in VM '{others[0]}', which could still use it",
                f"plug it out and in again, or vm-stop {others[0]}",
            )

    def _describe(
        self, device: UsbDevice, claims: Iterable[Claim], refused: list[tuple[str, UsbRule]], note: str
    ) -> UsbView:
        holder = self._find_holder(device)
        claim = find_claim(device, claims, refused)
        return UsbView(
            port=device.name,
            vendor=device.vendor,
            product=device.product,
            serial=device.serial,
            title=device.title,
            kinds=device.kinds,
            speed=device.speed,
            hub=device.is_hub,
            host_drivers=device.host_drivers,
            vm=holder.vm.name if holder else "",
            rule=f"{claim.vm}: {claim.rule}" if claim else "",
            obstacle=note,
        )

    async def _save(self) -> None:
        await loop.in_worker(state.save_state, state.as_content(self._runs), self._place.state_file)


def _survey(place: UsbPlace) -> tuple[list[UsbDevice], dict[Key, str]]:
    devices = find_devices(place.sysfs)
    return devices, {device.key: next(iter(find_obstacles(device, place.sysfs)), "") for device in devices}


def _take_device(device: UsbDevice, vmm_returns_it: bool, place: UsbPlace) -> int:  # noqa: FBT001
    """The descriptor, which the caller owns. Refused devices are left as they are."""
    if device.is_hub:
        raise BadRequest(f"USB device {device.name} is a hub", "attach what is plugged into it, one by one")
    if obstacles := find_obstacles(device, place.sysfs):
        fact = f"USB device {device.name} stays with the host: {obstacles[0]}"
        raise Busy(fact, "unmount it, then try again")
    fd = handover.open_device(device, place.dev, place.sysfs)
    try:
        handover.take_from_host(device, place.sysfs)
        if vmm_returns_it:
            handover.drop_privileges(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd
