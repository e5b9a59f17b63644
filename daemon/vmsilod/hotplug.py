"""Network interfaces of a VM that runs: one that its file has is given to it, one that it has is taken away.

Called by the lifecycle for the bus, under polkit's word. What the VM has afterwards is in its record as if
it had been started so, and its end gives everything back as always. Nothing is kept here, and no byte that a
guest wrote is read. The VM's lock is held throughout, so that its end does not come between.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from typing import TYPE_CHECKING

from vmsilod import loop
from vmsilod.bus.requests import RunRequest
from vmsilod.bus.views import NetworkView
from vmsilod.config.model import VmConfig
from vmsilod.config.network_claims import claims_of, describe, find_conflicts
from vmsilod.errors import BadRequest, Busy, ConfigBroken, NotRunning, VmsiloError
from vmsilod.interfaces import open_vhost
from vmsilod.network.guest import plan_guest_files
from vmsilod.network.names import derive_mac, derive_tap
from vmsilod.resources import record as records
from vmsilod.resources import rundir
from vmsilod.spawning import send_frame, spawn_frame
from vmsilod.vmm import drivers
from vmsilod.vmm.choose import VmmKind
from vmsilod.vmm.errors import MonitorRefused, MonitorUnreachable
from vmsilod.vmm.launch import NetDevice

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmsilod.config.network import InterfaceOptions
    from vmsilod.network.plan import Port
    from vmsilod.network.pool import NetworkPool, OpenPort
    from vmsilod.registry import Vm
    from vmsilod.relay_client import RelayClient
    from vmsilod.vmm.monitor import MonitorClient

log = logging.getLogger(__name__)

MONITOR_SECONDS = 15.0  # a guest takes its time to give a device up
TOLD_SECONDS = 1.0
"""What the guest's agent gets to do what it is told. It is not asked whether it did."""

# systemd-networkd reads as a user of its own. A VM that was offline does not run it.
TELL = """\
umask 022
mkdir -p /run/systemd/network && cd /run/systemd/network || exit
printf %s "$2" >"10-vmsilo-$1.link"
printf %s "$3" >"10-vmsilo-$1.network"
udevadm control --reload
systemctl start systemd-networkd
networkctl reload
"""


async def attach_interface(vm: Vm, pool: NetworkPool, relay: RelayClient, interface: str) -> None:
    """Rules first, then the TAP, then the guest. Raises a VmsiloError, and then all is as before."""
    async with vm.lock:
        monitor = _open_monitor(vm)
        if vm.config is None:
            raise ConfigBroken(f"VM '{vm.name}' is disabled: {'; '.join(vm.problems)}", "vmsilo check")
        before = _started(vm)
        after = add_interface(before, vm.config, interface)
        opened = await pool.attach(vm.name, _as_run(vm, after), interface)
        fds = list(opened.tap_fds)
        try:
            net = await _make_device(vm, opened)
            fds += net.vhost_fds
            # Before the VMM has it: a vmsilod that starts anew must know all that a VM has.
            await _save(vm, after)
            await _tell_guest(vm, pool.ports_of(vm.name), opened.port, relay)
            await loop.in_worker(monitor.attach_net, net)
        except BaseException as error:
            if not isinstance(error, MonitorRefused | MonitorUnreachable):
                with contextlib.suppress(VmsiloError):
                    await loop.in_worker(monitor.detach_net, f"net-{interface}")
            _close(fds)
            await pool.detach(vm.name, _as_run(vm, before), interface)
            await _save(vm, before)
            raise
        _close(fds)
        log.info("VM %s: interface %s (%s) attached", vm.name, interface, opened.port.tap)


async def detach_interface(vm: Vm, pool: NetworkPool, interface: str) -> None:
    """Where the VMM or the guest does not let go of it, its TAP is down all the same, and this raises."""
    async with vm.lock:
        monitor = _open_monitor(vm)
        before = _started(vm)
        configured = vm.config.network.interfaces if vm.config is not None else {}
        if interface not in before.network.interfaces and interface not in configured:
            raise BadRequest(
                f"VM '{vm.name}' has no interface '{interface[:64]}'", f"vmsilo network list {vm.name}"
            )
        failure: VmsiloError | None = None
        try:
            await loop.in_worker(monitor.detach_net, f"net-{interface}")
        except MonitorRefused:
            raise
        except VmsiloError as error:
            failure = error
        after = remove_interface(before, interface)
        await pool.detach(vm.name, _as_run(vm, after), interface)
        await _save(vm, after)
        if failure is not None:
            raise failure
        log.info("VM %s: interface %s detached", vm.name, interface)


def find_detached(vm: Vm) -> list[NetworkView]:
    """What a VM that runs has in its file and could be given."""
    started = vm.started
    if vm.config is None or started is None or not vm.is_up:
        return []
    taps = _find_taps(vm.config)
    return [
        NetworkView(
            *(name, taps[name], options.mac_address or derive_mac(vm.name, name), "detached"),
            kind=options.type,
            network=options.vm_network.name or options.macvtap.link or options.tap.bridge or "",
        )
        for name, options in vm.config.network.interfaces.items()
        if name not in started.network.interfaces
    ]


def add_interface(started: VmConfig, configured: VmConfig, interface: str) -> VmConfig:
    """What a VM has that was started with one configuration and gets an interface of another: all else, the
    TAPs of the others included, stays as it is. Pure. Raises BadRequest or Busy.
    """
    old, new = started.network.interfaces, configured.network.interfaces
    if interface in old:
        raise Busy(
            f"VM '{started.name}' has interface '{interface}' already",
            f"to give it anew: vmsilo network detach {started.name} {interface}",
        )
    if interface not in new:
        raise BadRequest(
            f"the configuration of VM '{started.name}' has no interface '{interface[:64]}'",
            f"add [network.interfaces.NAME] to its file: vmsilo network list {started.name}",
        )
    # In the order of the file: a restart would change nothing then, and none is asked for.
    names = [name for name in new if name in old or name == interface]
    names += [name for name in old if name not in new]
    taps, named = _find_taps(started), _find_taps(configured)
    taps[interface] = named[interface]
    words = {name: new[name] for name in names if name in new and taps[name] == named[name]}
    chosen = {
        # Also where the file leaves the name of its TAP open, and here it was written down.
        name: words[name]
        if name == interface or (name in words and _alike(old[name], words[name]))
        else old[name]
        for name in names
    }
    merged = _with_interfaces(started, chosen, taps)
    for first, second in find_conflicts(claims_of(merged.name, merged.network)):
        taken = first if second.interface == interface else second
        raise Busy(
            f"interface '{taken.interface}' of VM '{merged.name}', which runs, has {describe(taken)}",
            f"a restart of it gives interface '{interface}' its own",
        )
    return merged


def remove_interface(started: VmConfig, interface: str) -> VmConfig:
    """Pure. The TAPs of the others keep their names."""
    left = {name: options for name, options in started.network.interfaces.items() if name != interface}
    return _with_interfaces(started, left, _find_taps(started))


def _alike(one: InterfaceOptions, other: InterfaceOptions) -> bool:
    """But for the name of the TAP."""
    tap = one.tap.model_copy(update={"name": other.tap.name})
    return one.model_copy(update={"tap": tap}) == other


def _find_taps(config: VmConfig) -> dict[str, str]:
    return {
        name: options.tap.name or derive_tap(config.name, index)
        for index, (name, options) in enumerate(config.network.interfaces.items())
    }


def _with_interfaces(
    config: VmConfig, interfaces: Mapping[str, InterfaceOptions], taps: Mapping[str, str]
) -> VmConfig:
    """A TAP that is called by an interface's place among the others is named where that place is another."""
    placed: dict[str, InterfaceOptions] = {}
    for index, (name, options) in enumerate(interfaces.items()):
        if options.tap.name is None and derive_tap(config.name, index) != taps[name]:
            tap = options.tap.model_copy(update={"name": taps[name]})
            placed[name] = options.model_copy(update={"tap": tap})
        else:
            placed[name] = options
    network = config.network.model_copy(update={"interfaces": placed})
    merged = config.model_copy(update={"network": network})
    try:
        # As the next vmsilod will read it from the record.
        return VmConfig.from_json(merged.to_json())
    except ValueError as error:
        raise BadRequest(f"VM '{config.name}' cannot have these interfaces: {', '.join(placed)}") from error


def _started(vm: Vm) -> VmConfig:
    started = vm.started
    if started is None:
        raise ConfigBroken(f"it is not known what VM '{vm.name}' was started with", f"vm-stop {vm.name}")
    return started


def _as_run(vm: Vm, config: VmConfig) -> VmConfig:
    """With the VMM that "auto" came to, on which the number of queues depends."""
    assert vm.record is not None
    return config.model_copy(update={"vmm": vm.record.vmm})


def _open_monitor(vm: Vm) -> MonitorClient:
    if vm.unit.active != "active" or vm.record is None or not vm.record.launched:
        raise NotRunning(f"VM '{vm.name}' is not running", f"vm-start {vm.name}")
    driver = drivers.DRIVERS[VmmKind(vm.record.vmm)]
    return driver.open_monitor(rundir.VM_DIR / vm.name / "monitor.sock", timeout=MONITOR_SECONDS)


async def _make_device(vm: Vm, opened: OpenPort) -> NetDevice:
    assert vm.record is not None
    is_qemu = vm.record.vmm == VmmKind.QEMU.value
    vhost = await loop.in_worker(open_vhost, opened) if is_qemu else ()
    return NetDevice(opened.port.interface, opened.port.mac, tuple(opened.tap_fds), tuple(vhost))


async def _save(vm: Vm, config: VmConfig) -> None:
    assert vm.record is not None
    vm.record = dataclasses.replace(vm.record, config=config.to_json())
    await loop.in_worker(records.save_record, vm.record)


async def _tell_guest(vm: Vm, ports: tuple[Port, ...], port: Port, relay: RelayClient) -> None:
    """Name and addresses, as at boot, before the guest sees the device. One that does not listen has to
    configure it by itself.
    """
    if not vm.ready:
        return
    files = plan_guest_files(ports)
    texts = [files[f"network/10-vmsilo-{port.interface}.{suffix}"] for suffix in ("link", "network")]
    argv = ("sh", "-c", TELL, "sh", port.interface, *texts)
    try:
        frame = spawn_frame(RunRequest(vm.name, 0, argv, root=True, detach=True))
        fd = await relay.connect(vm.name, "root")
        try:
            await loop.in_worker(send_frame, fd, frame)
            await loop.after(TOLD_SECONDS)
        finally:
            os.close(fd)
    except VmsiloError as error:
        log.info("VM %s: its guest is not told of interface %s (%s)", vm.name, port.interface, error)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
