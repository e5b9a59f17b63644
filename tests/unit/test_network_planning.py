"""The plan that is made of all VMs' configurations, and of what those that run were started with."""

from __future__ import annotations

from ipaddress import ip_interface, ip_network
from typing import TYPE_CHECKING

import pytest
from vmsilod.config.load import Checks, Configuration, load_configuration
from vmsilod.network.plan import Allow, NetworkPlan, Port, Route
from vmsilod.network.planning import plan_network

if TYPE_CHECKING:
    from pathlib import Path

BARE = Checks(files=False, accounts=False, ownership=False)
NAT = '[host_networking.nat]\nenable = true\ninterface = "eth0"\n'


def load(root: Path, vms: dict[str, str], settings: str = "") -> Configuration:
    folder = root / "vms.d"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (root / "vmsilo.toml").write_text('user = "david"\n' + settings)
    for name, text in vms.items():
        (folder / f"{name}.toml").write_text(text)
    configuration = load_configuration([root], BARE)
    assert configuration.problems == ()
    return configuration


def plan(configuration: Configuration) -> NetworkPlan:
    return plan_network(configuration.settings, configuration.vms)


def test_offline_vms_have_no_part_in_it(tmp_path: Path) -> None:
    assert plan(load(tmp_path, {"a": "", "b": 'network.nameservers = ["1.1.1.1"]'})) == NetworkPlan()


def test_ports_of_a_vm(tmp_path: Path) -> None:
    text = """
    vmm = "qemu"
    cpus = 3
    [network]
    nameservers = ["1.1.1.1", "10.7.0.9"]
    allow = ["192.168.1.0/24", "10.0.0.5:80-90/tcp"]
    [network.interfaces.wan]
    tap.host_address = "10.0.0.254/24"
    tap.host_address_v6 = "fd00::fe/64"
    addresses = ["10.0.0.1/24"]
    v6_addresses = ["fd00::1/64"]
    routes."0.0.0.0/0" = { via = "10.0.0.254" }
    [network.interfaces.office]
    type = "vm-switch"
    mac_address = "02:00:00:00:00:01"
    vm_network = { name = "office", receive_broadcast = true, routes = ["10.8.0.0/16"] }
    addresses = ["10.7.0.1/24"]
    [network.interfaces.phys]
    type = "macvtap"
    macvtap.link = "enp3s0"
    tap.name = "mvt"
    dhcp = true
    """
    planned = plan(load(tmp_path, {"banking": text}, NAT))
    allow = (
        Allow(ip_network("192.168.1.0/24")),
        Allow(ip_network("10.0.0.5/32"), "tcp", (80, 90)),
    )
    assert planned == NetworkPlan(
        (
            Port(
                vm="banking",
                interface="wan",
                tap="banking-0",
                mac="3e:e2:0c:26:9e:86",
                queues=3,
                host_addresses=(ip_interface("10.0.0.254/24"), ip_interface("fd00::fe/64")),
                addresses=(ip_interface("10.0.0.1/24"), ip_interface("fd00::1/64")),
                routes=(Route(ip_network("0.0.0.0/0"), "10.0.0.254"),),
                nameservers=("1.1.1.1",),
                allow=allow,
            ),
            Port(
                vm="banking",
                interface="office",
                tap="banking-1",
                mac="02:00:00:00:00:01",
                queues=3,
                network="office",
                addresses=(ip_interface("10.7.0.1/24"),),
                nameservers=("10.7.0.9",),
                receive_broadcast=True,
                served=(ip_network("10.8.0.0/16"),),
                allow=allow,
            ),
            Port(
                vm="banking",
                interface="phys",
                tap="mvt",
                mac=planned.ports[2].mac,
                queues=3,
                link="enp3s0",
                dhcp=True,
                allow=allow,
            ),
        ),
        nat_interface="eth0",
    )
    assert [port.interface for port in planned.ports_of("banking")] == ["wan", "office", "phys"]


@pytest.mark.parametrize(
    ("lines", "queues"),
    [
        ('vmm = "qemu"\ncpus = 1', 1),
        ('vmm = "qemu"\ncpus = 16', 4),
        ('vmm = "cloud-hypervisor"\ncpus = 2', 2),
        ('vmm = "crosvm"\ncpus = 4', 1),
        ('vmm = "auto"\ncpus = 4', 1),
    ],
)
def test_queues_are_as_many_as_the_vmm_can_use(tmp_path: Path, lines: str, queues: int) -> None:
    (port,) = plan(load(tmp_path, {"a": lines + "\n[network.interfaces.x]"})).ports
    assert port.queues == queues


@pytest.mark.parametrize(
    ("vmm", "offload"), [("qemu", False), ("cloud-hypervisor", True), ("crosvm", True), ("auto", True)]
)
def test_only_a_vmm_that_insists_gets_the_virtio_header(tmp_path: Path, vmm: str, *, offload: bool) -> None:
    (port,) = plan(load(tmp_path, {"a": f'vmm = "{vmm}"\n[network.interfaces.x]'})).ports
    assert port.offload is offload


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # The more specific way, by a route or by being there.
        (
            'addresses = ["10.0.0.1/24"]\nroutes."0.0.0.0/0" = { via = "10.0.0.254" }',
            'addresses = ["10.1.0.1/24"]\nroutes."1.1.1.0/24" = { via = "10.1.0.254" }',
            [(), ("1.1.1.1",)],
        ),
        # None has a way: whoever gets one by DHCP; else all.
        ('addresses = ["10.0.0.1/24"]', "dhcp = true", [(), ("1.1.1.1",)]),
        ('addresses = ["10.0.0.1/24"]', "", [("1.1.1.1",), ("1.1.1.1",)]),
    ],
)
def test_nameserver_belongs_to_the_interface_that_leads_to_it(
    tmp_path: Path, first: str, second: str, expected: list[tuple[str, ...]]
) -> None:
    text = 'network.nameservers = ["1.1.1.1"]\n'
    text += f"[network.interfaces.a]\n{first}\n[network.interfaces.b]\n{second}\n"
    assert [port.nameservers for port in plan(load(tmp_path, {"a": text})).ports] == expected


def test_nat_is_off_unless_enabled_and_while_the_global_file_is_broken(tmp_path: Path) -> None:
    off = load(tmp_path, {}, NAT.replace("true", "false"))
    assert plan(off).nat_interface == ""
    assert plan_network(None, {}).nat_interface == ""
    assert plan(load(tmp_path, {}, NAT)).nat_interface == "eth0"


def test_vms_in_the_order_of_their_names_whatever_the_files_say(tmp_path: Path) -> None:
    vms = load(tmp_path, dict.fromkeys(("b", "a", "c"), "[network.interfaces.x]")).vms
    turned = {name: vms[name] for name in ("c", "b", "a")}
    assert plan_network(None, vms) == plan_network(None, turned)


def interface(address: str, more: str = "") -> str:
    own = f'tap.host_address = "{address}.254/24"\naddresses = ["{address}.1/24"]'
    return f"{more}[network.interfaces.x]\n{own}"


def test_running_vm_keeps_what_it_was_started_with_but_for_its_rules(tmp_path: Path) -> None:
    started = load(tmp_path, {"a": interface("10.0.0")}).vms
    now = load(tmp_path, {"a": interface("10.0.1", 'network.allow = ["10.9.0.0/16"]\n')}).vms
    (port,) = plan_network(None, now, started).ports
    assert port.addresses == (ip_interface("10.0.0.1/24"),)
    assert port.allow == (Allow(ip_network("10.9.0.0/16")),)
    (stopped,) = plan_network(None, now).ports
    assert stopped.addresses == (ip_interface("10.0.1.1/24"),)
    # Its file broken or gone: it runs on as it was started.
    assert plan_network(None, {}, started).ports == plan_network(None, started).ports


def test_vm_that_wants_what_a_running_one_still_has_waits(tmp_path: Path) -> None:
    started = load(tmp_path, {"z": interface("10.0.0")}).vms
    now = load(tmp_path, {"a": interface("10.0.0"), "b": interface("10.0.5"), "z": interface("10.0.1")}).vms
    planned = plan_network(None, now, started)
    assert [port.vm for port in planned.ports] == ["b", "z"]
    ((name, why),) = planned.withheld
    assert name == "a"
    assert why == "z still runs with the address 10.0.0.1"
    assert [port.vm for port in plan_network(None, now).ports] == ["a", "b", "z"]


def test_several_that_want_it_all_wait(tmp_path: Path) -> None:
    started = load(tmp_path, {"m": '[network.interfaces.x]\ntap.host_address = "10.0.0.254/8"'}).vms
    now = load(tmp_path, {name: interface(f"10.0.{n}") for n, name in enumerate(("a", "b", "z"))}).vms
    planned = plan_network(None, now, started)
    assert [port.vm for port in planned.ports] == ["m"]
    assert [name for name, _ in planned.withheld] == ["a", "b", "z"]
