"""An interface of a VM that runs comes and goes: real TAPs and rules, and QEMU's monitor."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from main_loop import run
from net.networks import ProcessHolders
from pool_tools import applied, ip, nft, pool_at, require_workers_here, taps_there, vm
from qmp_server import QmpServer
from vmsilod import hotplug
from vmsilod.config.model import VmConfig
from vmsilod.errors import BadRequest, Busy, Failed, NotRunning, StartFailed
from vmsilod.hotplug import attach_interface, detach_interface, find_detached
from vmsilod.network.macvtap import find_owners
from vmsilod.network.pool import NetworkPool
from vmsilod.network.switch import Switches
from vmsilod.registry import Vm
from vmsilod.relay_client import RelayClient
from vmsilod.resources import record as records
from vmsilod.resources import rundir
from vmsilod.systemd import INACTIVE
from vmsilod.vmm.errors import MonitorRefused, MonitorTimeout

if TYPE_CHECKING:
    from pathlib import Path


def with_lan(config: VmConfig, name: str = "lan", /, **lan: object) -> VmConfig:
    """The same with one more interface in its file."""
    content = config.model_dump()
    addresses = {"addresses": ["10.77.0.2/24"], "tap": {"host_address": "10.77.0.1/24"}}
    content["network"]["interfaces"][name] = addresses | lan
    return VmConfig.model_validate(content)


class Desk:
    """The VM vm1, which runs with eth0 and has `lan` in its file by now."""

    def __init__(self, pool: NetworkPool, path: Path, **lan: object) -> None:
        self.pool, self.path = pool, path
        self.file = with_lan(vm(1), **lan)
        applied(pool, vm(1))
        self.opened = run(pool.open("vm1"))
        self.vm = Vm("vm1", config=self.file, unit=dataclasses.replace(INACTIVE, active="active"))
        self.vm.record = records.Record(
            "vm1", self.vm.service, "a", config=vm(1).to_json(), launched=True, vmm="qemu"
        )
        applied(pool, self.file)

    def attach(self, interface: str = "lan") -> None:
        relay = RelayClient(lambda _event: None, lambda: None)  # the guest is not ready: nobody is told
        run(attach_interface(self.vm, self.pool, relay, interface))

    def detach(self, interface: str = "lan") -> None:
        run(detach_interface(self.vm, self.pool, interface))

    def recorded(self) -> list[str]:
        started = VmConfig.from_json(records.load_records(self.path / "state")["vm1"].config)
        return list(started.network.interfaces)

    def end(self) -> None:
        for fd in (fd for each in self.opened for fd in each.tap_fds):
            os.close(fd)
        run(self.pool.close("vm1"))


@pytest.fixture
def pool(tmp_path: Path) -> NetworkPool:
    require_workers_here()
    return pool_at(tmp_path / "lent")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rundir, "VM_DIR", tmp_path)
    monkeypatch.setattr(records.save_record, "__defaults__", (tmp_path / "state",))
    return tmp_path


def monitor_of(path: Path) -> Path:
    return path / "vm1" / "monitor.sock"


def is_up(tap: str) -> bool:
    return ",UP" in ip("link", "show", tap)


def test_an_interface_comes_with_its_rules_and_goes_with_its_tap(pool: NetworkPool, path: Path) -> None:
    desk = Desk(pool, path)
    assert taps_there() == {"vm1-0"}  # what runs keeps what it was started with
    assert [view.interface for view in find_detached(desk.vm)] == ["lan"]
    with QmpServer(monitor_of(path)) as qemu:
        desk.attach()
        assert qemu.devices == {"net-lan": "netport1"}
        assert "inet 10.77.0.1/24" in ip("addr", "show", "vm1-1")
        assert "LOWER_UP" in ip("link", "show", "vm1-1")
        assert "vm1-1" in nft("list", "chains", "netdev")
        assert desk.recorded() == ["eth0", "lan"]
        assert not desk.vm.restart_needed
        with pytest.raises(Busy, match="already"):
            desk.attach()
        desk.detach()
        assert not qemu.netdevs
    assert taps_there() == {"vm1-0"}
    assert "vm1-1" not in nft("list", "ruleset")
    assert desk.recorded() == ["eth0"]
    assert desk.vm.restart_needed
    desk.end()
    assert taps_there() == {"vm1-0", "vm1-1"}  # as its file says, for the next start


def test_one_that_it_was_started_with_is_taken_away_and_given_back(pool: NetworkPool, path: Path) -> None:
    desk = Desk(pool, path)
    with QmpServer(monitor_of(path)) as qemu:
        desk.attach()
        for fd in desk.opened[0].tap_fds:  # QEMU's of eth0: this test has it in QEMU's place
            os.close(fd)
        desk.opened.clear()
        desk.detach("eth0")
        assert taps_there() == {"vm1-1"}
        qemu.ports["netport2"] = ""
        desk.attach("eth0")
        assert taps_there() == {"vm1-0", "vm1-1"}
        assert desk.recorded() == ["eth0", "lan"]
        assert not desk.vm.restart_needed
    desk.end()


@pytest.mark.parametrize("refused", ["getfd", "netdev_add", "device_add"])
def test_a_vmm_that_refuses_leaves_nothing(pool: NetworkPool, path: Path, refused: str) -> None:
    desk = Desk(pool, path)
    before, rules = len(os.listdir("/proc/self/fd")), nft("list", "ruleset")  # noqa: PTH208
    with QmpServer(monitor_of(path), refuse=refused) as qemu:
        with pytest.raises(MonitorRefused):
            desk.attach()
        assert not qemu.netdevs
    assert taps_there() == {"vm1-0"}
    assert nft("list", "ruleset") == rules
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert desk.recorded() == ["eth0"]
    assert is_up("vm1-0")
    desk.end()


def test_a_vmm_that_is_gone_leaves_nothing(pool: NetworkPool, path: Path) -> None:
    desk = Desk(pool, path)
    with pytest.raises(NotRunning):
        desk.attach()
    assert taps_there() == {"vm1-0"}
    desk.end()


def test_an_interface_that_cannot_be_made_costs_the_others_nothing(pool: NetworkPool, path: Path) -> None:
    desk = Desk(pool, path, addresses=[], tap={"bridge": "nobridge"})
    with QmpServer(monitor_of(path)) as qemu:
        with pytest.raises(Failed, match="there is no bridge 'nobridge'"):
            desk.attach()
        assert not qemu.commands
    assert taps_there() == {"vm1-0"}
    assert is_up("vm1-0")
    desk.end()


def test_what_another_vm_that_runs_has_is_refused(pool: NetworkPool, path: Path) -> None:
    desk = Desk(pool, path)
    other = vm(2, tap={"name": "vm1-1"})
    applied(pool, vm(1), other)
    held = run(pool.open("vm2"))
    with QmpServer(monitor_of(path)), pytest.raises(Busy, match="still runs with the TAP name vm1-1"):
        desk.attach()
    assert is_up("vm1-0")
    assert is_up("vm1-1")
    assert "alias vmsilo:vm2:eth0" in ip("link", "show", "vm1-1")
    for fd in held[0].tap_fds:
        os.close(fd)
    desk.end()


def test_a_guest_that_does_not_let_go_is_cut_off(
    pool: NetworkPool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hotplug, "MONITOR_SECONDS", 0.5)
    desk = Desk(pool, path)
    with QmpServer(monitor_of(path), silent=True) as qemu:
        desk.attach()
        with pytest.raises(MonitorTimeout):
            desk.detach()
        assert qemu.netdevs  # its queues are open still
        assert not is_up("vm1-1")
        assert "vm1-1" not in nft("list", "ruleset")
        with pytest.raises(StartFailed, match="another process has it open"):
            desk.attach()
        assert not is_up("vm1-1")
    desk.end()
    assert desk.recorded() == ["eth0"]


def test_a_restarted_daemon_knows_what_was_attached(pool: NetworkPool, path: Path) -> None:
    desk = Desk(pool, path)
    with QmpServer(monitor_of(path)):
        desk.attach()
        again = pool_at(path / "lent")
        run(again.repair({"vm1": desk.vm.started_as}))
        applied(again, vm(1))  # and its file has it no more
        assert "LOWER_UP" in ip("link", "show", "vm1-1")
        assert "vm1-1" in nft("list", "chains", "netdev")
    desk.end()


def test_a_macvtap_comes_and_goes_and_the_others_stay(pool: NetworkPool, path: Path) -> None:
    ip("link", "add", "phys", "type", "veth", "peer", "name", "far")
    lan = {"type": "macvtap", "macvtap": {"link": "phys"}, "tap": {}, "addresses": []}
    desk = Desk(pool, path, **lan)
    desk.vm.config = with_lan(desk.file, "dmz", **lan)
    applied(pool, desk.vm.config)
    with QmpServer(monitor_of(path)) as qemu:
        qemu.ports["netport2"] = ""
        desk.attach("lan")
        desk.attach("dmz")
        assert "vmsilo-macvtap-vm1-2" in nft("list", "tables")
        views = {view.interface: view for view in run(pool.find_views("vm1"))}
        assert list(views) == ["eth0", "lan", "dmz"]
        shown = views["lan"]
        assert (shown.kind, shown.network, shown.tap, shown.dropped) == ("macvtap", "phys", "vm1-1", {})
        assert (shown.state, shown.problem) == ("up", "'phys' has no carrier")
        desk.detach("lan")
        assert taps_there() == {"phys", "far", "vm1-0", "vm1-2"}
        assert "vmsilo-macvtap-vm1-1" not in nft("list", "tables")
        ip("link", "del", "phys")
        with pytest.raises(StartFailed, match="no network interface 'phys'"):
            desk.attach("lan")
        assert not find_owners()  # the kernel took the other one with its link
        desk.detach("dmz")
    desk.end()


def test_a_port_of_a_vm_to_vm_network_comes_and_goes(path: Path) -> None:
    require_workers_here()
    holders = ProcessHolders()
    network = {"type": "vm-switch", "vm_network": {"name": "inner"}, "tap": {}}
    desk = Desk(NetworkPool(Switches(holders), path / "lent"), path, **network)
    assert not holders.processes
    with QmpServer(monitor_of(path)):
        desk.attach()
        inside = ("nsenter", "-n", "-t", str(holders.processes["inner"].pid), "ip", "-o", "link")
        shown = subprocess.run(inside, capture_output=True, text=True, check=True).stdout
        assert any("vm1-1" in line and "LOWER_UP" in line for line in shown.splitlines())
        view = run(desk.pool.find_views("vm1"))[1]
        assert (view.interface, view.tap, view.kind, view.network) == ("lan", "vm1-1", "vm-switch", "inner")
        assert (view.state, view.problem) == ("up", "")
        desk.detach()
        assert not holders.processes
    assert taps_there() == {"vm1-0"}
    desk.vm.config = vm(1)
    applied(desk.pool, vm(1))
    desk.end()


def test_what_is_no_interface_is_told(pool: NetworkPool, path: Path) -> None:
    desk = Desk(pool, path)
    with QmpServer(monitor_of(path)) as qemu:
        for order in (desk.attach, desk.detach):
            with pytest.raises(BadRequest, match="no interface 'x'"):
                order("x")
        qemu.ports.clear()  # as with the machine "microvm"
        with pytest.raises(MonitorRefused, match="no port"):
            desk.detach("eth0")
        assert not qemu.cut
    assert is_up("vm1-0")
    desk.vm.unit = INACTIVE
    with pytest.raises(NotRunning):
        desk.attach()
    desk.end()
