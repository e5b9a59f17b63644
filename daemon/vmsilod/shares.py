"""The shared directories of running VMs: the unit with a virtiofsd for each, and what its process may have.

Owned by runs.py, which plans a VM's shares when it starts, opens them, and closes them when its leases are
given back. A unit's process (vmsilo_share) shows the directory that it sees and gets virtiofsd's command
line and listening socket; this daemon never serves a byte, and a restart of it changes nothing. The units
are bound to the VM's: when that ends, so do they. A virtiofsd that ends by itself takes the VM with it: a
guest whose home hangs is none.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

from vmsilod import loop
from vmsilod.config.shares import HOME_TAG
from vmsilod.errors import BadRequest, StartFailed, VmsiloError
from vmsilod.host import find_uid
from vmsilod.resources import image, rundir, shares, vhost_user
from vmsilod.resources.shares import GuestUser, Share
from vmsilod.units.shares import home_unit, share_unit
from vmsilod.vmm.choose import VmmKind
from vmsilod.vmm.launch import ShareDevice

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from vmsilod.config import VmConfig
    from vmsilod.control import Peer
    from vmsilod.preparation import Acquired, Request
    from vmsilod.registry import Registry, Vm
    from vmsilod.systemd import Systemd, UnitState

log = logging.getLogger(__name__)

LOOK_AGAIN = (1.0, 5.0, 25.0)  # seconds; systemd says each change once
SETTLE_SECONDS = 1.0  # systemd tells of the end of virtiofsd before that of the VMM, which it follows


class Shares:
    def __init__(self, registry: Registry, systemd: Systemd) -> None:
        self._registry = registry
        self._systemd = systemd
        self._planned: dict[str, tuple[Share, ...]] = {}
        self._unasked: dict[str, int] = {}  # listeners that their units have not asked for yet
        self._vm_of: dict[str, str] = {}  # units that are watched

    async def plan(self, config: VmConfig, request: Request) -> dict[str, str]:
        """The guest's mount units. Raises StartFailed for what cannot be shared; makes the home that is not
        there yet.
        """
        self._planned.pop(config.name, None)
        if config.shared_home is False and not config.shared_directories:
            return {}
        await loop.in_worker(shares.find_virtiofsd)
        files = await loop.in_worker(image.find_boot_files, request.boot)
        guest = GuestUser(files.login, config.guest_id or files.uid)
        planned = await loop.in_worker(shares.plan_shares, config, guest)
        for share in planned:
            if share.is_home and not await loop.in_worker(shares.has_home, share):
                await self._make_home(config.name, share)
            await loop.in_worker(check_directory, config.user, share)
        self._planned[config.name] = planned
        return shares.plan_mounts(planned)

    async def _make_home(self, name: str, share: Share) -> None:
        unit = home_unit(name)
        result = await self._systemd.start(unit)
        if result != "done" or not await loop.in_worker(shares.has_home, share):
            await self._systemd.reset_failed(unit)
            raise StartFailed(
                f"the shared home {share.path} of VM '{name}' could not be made", f"journalctl -u {unit}"
            )
        log.info("VM %s: %s was made", name, share.path)

    async def open(self, vm: Vm, acquired: Acquired, request: Request) -> tuple[ShareDevice, ...]:
        """Start each virtiofsd; the descriptors are for its VMM and the caller's from here on."""
        planned = self._planned.get(vm.name, ())
        if not planned:
            return ()
        assert vm.record is not None
        units = {share.tag: share_unit(vm.record.unit, share.tag) for share in planned}
        for share in planned:
            self._unasked[units[share.tag]] = await loop.in_worker(
                rundir.bind_listener,
                socket_path(acquired.rundir, share),
                socket.SOCK_STREAM,
                0o600,
                (request.uid, request.gid),
            )
        # All at once: most of it is the start of an interpreter.
        starts = [(unit, loop.spawn(self._start(unit))) for unit in units.values()]
        results = [(unit, await loop.wait_for(start)) for unit, start in starts]
        for unit, result in results:
            if result != "done":
                raise StartFailed(
                    f"a shared directory of VM '{vm.name}' is not served", f"journalctl -u {unit}"
                )
        devices: list[ShareDevice] = []
        try:
            for share in planned:
                path = socket_path(acquired.rundir, share)
                connect = vhost_user.connect_socket if request.opens_as is None else vhost_user.open_socket
                try:
                    devices.append(ShareDevice(share.tag, await loop.in_worker(connect, path)))
                except StartFailed as error:
                    raise StartFailed(
                        f"the virtiofsd of '{share.tag}', a shared directory of VM '{vm.name}', has ended",
                        f"journalctl -u {units[share.tag]}",
                    ) from error
        except BaseException:
            for device in devices:
                os.close(device.fd)
            raise
        self._follow(vm, units.values())
        return tuple(devices)

    async def _start(self, unit: str) -> str:
        await self._stop(unit)  # what a run that nobody saw the end of has left of it would be in the way
        return await self._systemd.start_bound(unit)

    async def answer(
        self, peer: Peer, fds: list[int], *, listening: bool
    ) -> tuple[dict[str, Any], list[int]]:
        """What the process of a share's unit becomes; the listener is the caller's."""
        vm = self._registry.require(peer.name)
        share = next(
            (s for s in self._shares_of(vm) if vm.record and share_unit(vm.record.unit, s.tag) == peer.unit),
            None,
        )
        config = vm.started
        if share is None or config is None or len(fds) != 1:
            raise BadRequest(f"unit {peer.unit} serves no directory of a VM that runs")
        await loop.in_worker(compare_directory, config.user, share, fds[0])
        program = await loop.in_worker(shares.find_virtiofsd)
        listener = None if listening else self._unasked.pop(peer.unit, None)
        if listener is None and not listening:
            raise StartFailed(f"{peer.unit} has had its socket already", f"vm-stop {vm.name}")
        assert vm.record is not None
        argv = shares.plan_arguments(share, program, tells_tag=vm.record.vmm == VmmKind.CROSVM.value)
        return {"argv": argv}, [] if listener is None else [listener]

    def _shares_of(self, vm: Vm) -> Sequence[Share]:
        """After a restart of vmsilod made again of what the VM was started with."""
        planned = self._planned.get(vm.name)
        if planned is None and vm.started is not None and vm.record is not None:
            guest = GuestUser(vm.record.login, vm.record.guest_uid)
            planned = self._planned[vm.name] = shares.plan_shares(vm.started, guest)
        return planned or ()

    async def close(self, vm: Vm) -> None:
        """No virtiofsd of the VM runs when this returns."""
        self._planned.pop(vm.name, None)
        if vm.record is None or vm.started is None:
            return
        units = units_of(vm.started, vm.record.unit)
        for unit in units:
            self._vm_of.pop(unit, None)
            self._systemd.unfollow(unit)
            listener = self._unasked.pop(unit, None)
            if listener is not None:
                os.close(listener)
        for stop in [loop.spawn(self._stop(unit)) for unit in units]:
            try:
                await loop.wait_for(stop)
            except VmsiloError as error:
                log.info("VM %s: %s", vm.name, error)

    async def _stop(self, unit: str) -> None:
        await self._systemd.stop(unit)
        await self._systemd.reset_failed(unit)

    # One that ends by itself

    async def watch(self, vm: Vm) -> None:
        """Of a VM that the last vmsilod started."""
        if vm.record is None or vm.started is None or not vm.record.launched:
            return
        units = units_of(vm.started, vm.record.unit)
        self._follow(vm, units)
        for unit in units:
            self._look_later(unit)

    def _follow(self, vm: Vm, units: Iterable[str]) -> None:
        for unit in units:
            self._vm_of[unit] = vm.name
            self._systemd.follow(unit)

    def unit_changed(self, unit: str) -> None:
        if unit in self._vm_of:
            self._look_later(unit)

    def _look_later(self, unit: str) -> None:
        loop.spawn(loop.insist(partial(self._look, unit), LOOK_AGAIN, unit))

    async def _look(self, unit: str) -> None:
        state = await self._systemd.state(unit)
        if state.active not in ("failed", "inactive"):
            return
        await loop.after(SETTLE_SECONDS)
        vm = self._registry.find(self._vm_of.get(unit, ""))
        if vm is None or vm.record is None or vm.lost_share or not vm.record.launched:
            return
        run = await self._systemd.state(vm.record.unit)
        again = await self._systemd.state(unit)
        if run.active != "active" or run.invocation != vm.record.invocation or again.is_up:
            return
        vm.lost_share = describe_end(unit, state)
        log.error("VM %s: %s; the VM ends", vm.name, vm.lost_share)
        try:
            await self._systemd.kill(vm.record.unit, signal.SIGKILL)
        except VmsiloError as error:
            log.info("VM %s: %s", vm.name, error)


def units_of(config: VmConfig, parent: str) -> list[str]:
    tags = [HOME_TAG] if config.shared_home is not False else []
    return [share_unit(parent, tag) for tag in (*tags, *(entry.tag for entry in config.shared_directories))]


def describe_end(unit: str, state: UnitState) -> str:
    how = "ended"
    if state.active == "failed":
        crashed = state.exit_code in (os.CLD_KILLED, os.CLD_DUMPED)
        how = f"ended by signal {state.exit_status}" if crashed else f"ended with {state.exit_status}"
    tag = unit.partition("@")[2].removesuffix(".service")
    return f"the virtiofsd of its shared directory '{tag}' {how}"


def socket_path(directory: Path, share: Share) -> Path:
    return directory / f"share-{share.tag}"


def check_directory(user: str, share: Share) -> None:
    os.close(open_share(user, share))


def open_share(user: str, share: Share) -> int:
    """The directory, by a safe way; the caller owns the descriptor. StartFailed for another than meant."""
    fd = shares.open_directory(share.path, {find_uid(user), share.uid})
    status = os.fstat(fd)
    if share.inode not in (None, (status.st_dev, status.st_ino)):
        os.close(fd)
        raise StartFailed(f"{share.path} is not the directory any more that it was asked for")
    return fd


def compare_directory(user: str, share: Share, seen: int) -> None:
    """`seen` is what the unit has at /share; it must be what a safe way leads to now."""
    fd = open_share(user, share)
    try:
        if not shares.is_same(fd, seen):
            raise StartFailed(f"{share.path} was exchanged while the VM started", "start it again")
    finally:
        os.close(fd)
