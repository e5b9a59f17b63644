"""Network interfaces of running VMs: each VMM's client against a real socket."""

from __future__ import annotations

import json
import os
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from cloud_hypervisor_server import cloud_hypervisor_that_answers
from qmp_server import QmpServer
from vmsilod.vmm.cloud_hypervisor_api import CloudHypervisorMonitor
from vmsilod.vmm.crosvm_control import CrosvmMonitor
from vmsilod.vmm.errors import BadOptionValue, MonitorRefused, MonitorTimeout
from vmsilod.vmm.launch import NetDevice
from vmsilod.vmm.qmp import QemuMonitor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "monitor.sock"


@pytest.fixture
def net() -> Iterator[NetDevice]:
    taps = tuple(os.open("/dev/null", os.O_RDWR) for _ in range(2))
    vhosts = tuple(os.open("/dev/zero", os.O_RDWR) for _ in range(2))
    yield NetDevice("lan", "02:00:00:00:00:02", taps, vhosts)
    for fd in (*taps, *vhosts):
        os.close(fd)  # fails if somebody closed what was the caller's


@pytest.mark.parametrize("late", [False, True])
def test_an_interface_of_qemu_comes_and_goes(path: Path, net: NetDevice, *, late: bool) -> None:
    with QmpServer(path, late=late) as qemu:
        monitor = QemuMonitor(path)
        monitor.attach_net(net)
        assert qemu.devices == {"net-lan": "netport1"}
        leads_to = [os.readlink(f"/proc/self/fd/{fd}") for fd in qemu.netdevs["net-lan"]]  # noqa: PTH115
        assert leads_to == ["/dev/null", "/dev/null", "/dev/zero", "/dev/zero"]
        monitor.detach_net(net.id)
        assert not qemu.netdevs
        assert not qemu.devices
        monitor.attach_net(replace(net, vhost_fds=()))
        assert len(qemu.netdevs["net-lan"]) == 2


def test_qemu_takes_an_interface_whose_device_is_gone_away(path: Path, net: NetDevice) -> None:
    with QmpServer(path) as qemu:
        QemuMonitor(path).attach_net(net)
        del qemu.devices["net-lan"]
        QemuMonitor(path).detach_net(net.id)
        assert not qemu.netdevs


@pytest.mark.parametrize("refused", ["getfd", "netdev_add", "device_add"])
def test_a_refused_interface_leaves_no_queue_in_qemu(path: Path, net: NetDevice, refused: str) -> None:
    with QmpServer(path, refuse=refused) as qemu:
        with pytest.raises(MonitorRefused):
            QemuMonitor(path).attach_net(net)
        assert not qemu.netdevs
        assert not qemu.named


def test_the_same_interface_twice_is_refused_and_the_first_stays(path: Path, net: NetDevice) -> None:
    with QmpServer(path) as qemu:
        qemu.ports["netport2"] = ""
        QemuMonitor(path).attach_net(net)
        with pytest.raises(MonitorRefused, match="Duplicate"):
            QemuMonitor(path).attach_net(net)
        assert not qemu.named
        assert qemu.devices == {"net-lan": "netport1"}


def test_a_qemu_without_a_free_port_says_why(path: Path, net: NetDevice) -> None:
    with QmpServer(path) as qemu:
        qemu.ports = {"netport0": "net-wan"}
        with pytest.raises(MonitorRefused, match="no port of the VM is left"):
            QemuMonitor(path).attach_net(net)
        qemu.ports = {}
        with pytest.raises(MonitorRefused) as caught:
            QemuMonitor(path).attach_net(net)
        assert "q35" in caught.value.hint
        assert not qemu.named


def test_a_microvm_keeps_its_interface_and_the_link_of_it(path: Path, net: NetDevice) -> None:
    with QmpServer(path) as qemu:
        qemu.ports = {}
        with pytest.raises(MonitorRefused, match="no port"):
            QemuMonitor(path).detach_net(net.id)
        assert not qemu.cut


def test_a_guest_of_qemu_that_keeps_an_interface_is_cut_off_all_the_same(path: Path, net: NetDevice) -> None:
    with QmpServer(path, silent=True) as qemu:
        QemuMonitor(path).attach_net(net)
        with pytest.raises(MonitorTimeout):
            QemuMonitor(path, timeout=0.2).detach_net(net.id)
        assert qemu.cut == ["net-lan"]


def info_with(*devices: str) -> tuple[int, bytes]:
    return 200, json.dumps({"config": {}, "device_tree": {name: {} for name in devices}}).encode()


def test_an_interface_of_cloud_hypervisor_comes(path: Path, net: NetDevice) -> None:
    added = 200, b'{"id":"net-lan","bdf":"0000:00:06.0"}'
    answers = {"vm.info": info_with("_disk0"), "vm.add-net": added}
    with cloud_hypervisor_that_answers(path, answers) as server:
        CloudHypervisorMonitor(path).attach_net(replace(net, vhost_fds=()))
        with pytest.raises(MonitorRefused):
            CloudHypervisorMonitor(path).attach_net(net)
    body = {"id": "net-lan", "mac": "02:00:00:00:00:02", "num_queues": 4}
    assert server.requests[1:] == [("PUT", "vm.add-net", body)]
    assert server.files == ["/dev/null", "/dev/null"]


def test_cloud_hypervisor_is_not_sent_an_interface_that_it_has(path: Path, net: NetDevice) -> None:
    with (
        cloud_hypervisor_that_answers(path, {"vm.info": info_with("net-lan")}) as server,
        pytest.raises(MonitorRefused, match="already"),
    ):
        CloudHypervisorMonitor(path).attach_net(replace(net, vhost_fds=()))
    assert not server.files


@contextmanager
def ejecting_after(answers: dict[str, tuple[int, bytes]], seconds: float) -> Iterator[None]:
    timer = threading.Timer(seconds, lambda: answers.update({"vm.info": info_with("_disk0")}))
    timer.start()
    yield
    timer.join()


def test_an_interface_of_cloud_hypervisor_goes_when_the_guest_lets_it(path: Path) -> None:
    answers = {"vm.info": info_with("_disk0", "net-lan"), "vm.remove-device": (204, b"")}
    with cloud_hypervisor_that_answers(path, answers) as server, ejecting_after(server.answers, 0.2):
        CloudHypervisorMonitor(path).detach_net("net-lan")
        assert server.answers["vm.info"] == info_with("_disk0")
        CloudHypervisorMonitor(path).detach_net("net-lan")
    assert [name for _, name, _ in server.requests].count("vm.remove-device") == 1


def test_a_guest_of_cloud_hypervisor_that_keeps_an_interface_is_a_timeout(path: Path) -> None:
    answers = {"vm.info": info_with("net-lan"), "vm.remove-device": (204, b"")}
    with cloud_hypervisor_that_answers(path, answers), pytest.raises(MonitorTimeout):
        CloudHypervisorMonitor(path, timeout=0.2).detach_net("net-lan")


def test_crosvm_refuses_and_says_what_to_do(path: Path, net: NetDevice) -> None:
    with pytest.raises(MonitorRefused, match="takes no network interface") as caught:
        CrosvmMonitor(path).attach_net(net)
    assert "restart" in caught.value.hint
    with pytest.raises(MonitorRefused, match="gives no network interface back"):
        CrosvmMonitor(path).detach_net(net.id)


@pytest.mark.parametrize("monitor", [QemuMonitor, CloudHypervisorMonitor])
def test_no_name_or_address_that_could_be_something_else(
    path: Path, net: NetDevice, monitor: type[QemuMonitor | CloudHypervisorMonitor]
) -> None:
    with pytest.raises(BadOptionValue):
        monitor(path).attach_net(replace(net, name="a,b", vhost_fds=()))
