"""What a disposable is, made of its template: nothing more, and nothing that only one VM can have."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

import pytest
from vmsilod.config.disposables import DisposableOptions
from vmsilod.config.load import Checks, load_configuration
from vmsilod.config.model import VmConfig
from vmsilod.config.shares import SharedDirectory
from vmsilod.disposables.derive import Wish, derive
from vmsilod.disposables.find import BUILT_IN, Templates, find_template
from vmsilod.disposables.places import Here
from vmsilod.disposables.subnets import Subnets
from vmsilod.errors import BadRequest, Busy, ConfigBroken, NoSuchVm
from vmsilod.network.planning import plan_network
from vmsilod.shapes import shape_of

if TYPE_CHECKING:
    from pathlib import Path

    from vmsilod.config.load import Configuration
    from vmsilod.disposables.derive import Derived

BARE = Checks(files=False, accounts=False, ownership=False)
ROUTED = """
[network]
nameservers = ["9.9.9.9"]
allow = ["192.168.1.0/24:80/tcp"]
[network.interfaces.wan]
tap.host_address = "10.0.0.254/24"
addresses = ["10.0.0.1/24"]
routes."0.0.0.0/0" = { via = "10.0.0.254" }
"""


def load(root: Path, settings: str = "", **vms: str) -> Configuration:
    (root / "vms.d").mkdir()
    (root / "vmsilo.toml").write_text('user = "david"\n' + settings)
    for name, text in vms.items():
        (root / "vms.d" / f"{name}.toml").write_text(text)
    configuration = load_configuration([root], BARE)
    assert configuration.problems == ()
    return configuration


def template_of(root: Path, text: str) -> VmConfig:
    return load(root, work=text).vms["work"]


def derive_from(template: VmConfig, *, network: bool = True) -> Derived:
    return derive(template, Wish("work-d000001", network), Subnets(DisposableOptions(), []))


def test_it_is_the_same_machine_under_another_name(tmp_path: Path) -> None:
    text = 'memory = 777\ncpus = 3\nkernel_params = ["x=1"]\nauto_start = true\nrestart = "on-crash"\n'
    derived = derive_from(template_of(tmp_path, text))
    config = derived.config
    assert (config.name, config.template, config.disposable) == ("work-d000001", "work", True)
    assert (config.memory, config.cpus, config.kernel_params, config.user) == (777, 3, ("x=1",), "david")
    assert not config.auto_start
    assert config.restart.policy == "no"
    assert not config.ssh
    assert derived.notes == ()


def test_a_routed_interface_gets_a_network_of_its_own_and_the_same_limits(tmp_path: Path) -> None:
    template = template_of(tmp_path, ROUTED)
    derived = derive_from(template)
    assert derived.notes == ()
    assert derived.config.network.allow == template.network.allow
    configs = {"work": template, "work-d000001": derived.config}
    plan = plan_network(None, configs)
    assert not plan.withheld  # the two do not take anything of each other
    (theirs,), (ours,) = plan.ports_of("work"), plan.ports_of("work-d000001")
    (host,), (own,) = ours.host_addresses, ours.addresses
    assert host.network.prefixlen == 30
    assert str(host).startswith("10.138.")
    assert own.network == host.network
    assert own.ip != host.ip
    assert [(str(route.destination), route.via) for route in ours.routes] == [("0.0.0.0/0", str(host.ip))]
    assert (ours.nameservers, ours.allow) == (theirs.nameservers, theirs.allow)
    assert ours.tap != theirs.tap
    assert ours.mac != theirs.mac


def test_ipv6_comes_with_the_template_and_not_otherwise(tmp_path: Path) -> None:
    text = """
    [network.interfaces.wan]
    tap.host_address_v6 = "fd00::fe/64"
    v6_addresses = ["fd00::1/64"]
    v6_routes."::/0" = { via = "fd00::fe" }
    """
    (interface,) = derive_from(template_of(tmp_path, text)).config.network.interfaces.values()
    assert interface.tap.host_address is None
    assert interface.addresses == ()
    host = ipaddress.ip_interface(interface.tap.host_address_v6 or "")
    assert str(host).startswith("fd76:6d73:696c:")
    assert host.network.prefixlen == 64
    assert interface.v6_routes["::/0"].via == str(host.ip)


def test_a_name_server_at_the_hosts_end_stays_within_reach(tmp_path: Path) -> None:
    text = ROUTED.replace("9.9.9.9", "10.0.0.254").replace('routes."0.0.0.0/0"', 'routes."10.9.0.0/16"')
    (interface,) = derive_from(template_of(tmp_path, text)).config.network.interfaces.values()
    via = str(ipaddress.ip_interface(interface.tap.host_address or "").ip)
    assert {destination: route.via for destination, route in interface.routes.items()} == {
        "10.9.0.0/16": via,
        "10.0.0.254/32": via,
    }


def test_what_only_one_vm_can_have_is_left_out_and_told(tmp_path: Path) -> None:
    text = """
    pci_devices = ["01:00.0"]
    usb_devices = ["046d:c52b"]
    [network]
    forward_ports = [{ from = "host", host = 2222, guest = 22 }]
    [network.interfaces.office]
    type = "vm-switch"
    vm_network.name = "office"
    addresses = ["10.7.0.1/24"]
    [network.interfaces.lan]
    tap.bridge = "br0"
    dhcp = true
    mac_address = "02:00:00:00:00:01"
    tap.name = "lan-tap"
    [network.interfaces.fixed]
    tap.bridge = "br0"
    addresses = ["10.8.0.1/24"]
    """
    derived = derive_from(template_of(tmp_path, text))
    config = derived.config
    assert (config.pci_devices, config.usb_devices, config.network.forward_ports) == ((), (), ())
    assert list(config.network.interfaces) == ["lan"]
    lan = config.network.interfaces["lan"]
    assert (lan.mac_address, lan.tap.name, lan.tap.bridge, lan.dhcp) == (None, None, "br0", True)
    told = "\n".join(derived.notes)
    for word in ("PCI", "USB", "forwarded ports", "interface office", "interface fixed"):
        assert word in told


def test_without_network_it_has_none(tmp_path: Path) -> None:
    derived = derive_from(template_of(tmp_path, ROUTED), network=False)
    assert not derived.config.network.interfaces
    assert derived.notes == ()


def test_homes_and_shares_stay_with_the_template(tmp_path: Path) -> None:
    text = 'shared_home = true\nshared_directories = [{ path = "/srv/work", tag = "work" }]\n'
    template = template_of(tmp_path, text)
    derived = derive_from(template)
    assert (derived.config.shared_home, derived.config.shared_directories) == (False, ())
    assert "shared directories" in derived.notes[0]
    here = SharedDirectory.model_validate({"path": "/home/me/x", "mount": "/home/me/x", "tag": "here"})
    wish = Wish("work-d000001", network=False, here=Here(here, (64, 4711)), owner=1234)
    config = derive(template, wish, Subnets(DisposableOptions(), [])).config
    assert (config.shared_directories, config.shared_inode) == ((here,), (64, 4711))
    assert VmConfig.from_json(config.to_json()) == config
    assert "vmsilo.ids=1234:1234" in shape_of(config).kernel_params
    assert shape_of(template).kernel_params == ()


def test_a_template_that_writes_to_its_own_disk_is_refused(tmp_path: Path) -> None:
    text = 'root_disk = "/disk"\nroot_disk_readonly = false\n'
    with pytest.raises(BadRequest, match="root disk"):
        derive_from(template_of(tmp_path, text))
    (tmp_path / "other").mkdir()
    derive_from(template_of(tmp_path / "other", 'root_disk = "/disk"\n'))


def test_networks_that_others_have_are_left_alone() -> None:
    options = DisposableOptions(network="10.138.0.0/28")
    taken = [ipaddress.ip_network("10.138.0.0/29"), ipaddress.ip_network("10.138.0.12/32")]
    subnets = Subnets(options, taken)
    assert str(subnets.take_v4()) == "10.138.0.8/30"
    with pytest.raises(Busy, match="is free"):
        subnets.take_v4()


def test_templates(tmp_path: Path) -> None:
    configuration = load(tmp_path, 'disposables.template = "work"\n', work="memory = 333\n", other="")
    templates = Templates(configuration.settings, configuration.vms)
    assert find_template(templates, "").memory == 333
    assert find_template(templates, "other").name == "other"
    with pytest.raises(NoSuchVm):
        find_template(templates, "absent")
    with pytest.raises(ConfigBroken):
        find_template(Templates(), "work")


def test_the_built_in_template_is_offline(tmp_path: Path) -> None:
    configuration = load(tmp_path)
    template = find_template(Templates(configuration.settings, configuration.vms), "")
    assert (template.name, template.image, template.network.interfaces) == (BUILT_IN, "default", {})


def test_a_default_template_that_is_no_vm(tmp_path: Path) -> None:
    configuration = load(tmp_path, 'disposables.template = "gone"\n')
    with pytest.raises(BadRequest, match=r"disposables\.template|gone"):
        find_template(Templates(configuration.settings, configuration.vms), "")


@pytest.mark.parametrize(
    "text",
    [
        'disposables.network = "10.138.0.0/30"',
        'disposables.network = "10.138.0.1/16"',
        'disposables.network_v6 = "fd00::/64"',
        "disposables.limit = 0",
        'disposables.typo = ""',
    ],
)
def test_options_that_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "vms.d").mkdir()
    (tmp_path / "vmsilo.toml").write_text(f'user = "david"\n{text}\n')
    (problem,) = load_configuration([tmp_path], BARE).problems
    assert problem.key.startswith("disposables")


def test_a_vm_whose_every_start_is_fresh_has_no_home_of_its_own(tmp_path: Path) -> None:
    configuration = load(tmp_path, "shared_home = true\n", fresh="disposable = true\n", other="")
    assert configuration.vms["fresh"].shared_home is False
    assert configuration.vms["other"].shared_home is True
    (tmp_path / "vms.d" / "fresh.toml").write_text("disposable = true\nshared_home = true\n")
    (problem,) = load_configuration([tmp_path], BARE).problems
    assert (problem.vm, problem.key) == ("fresh", "shared_home")


def test_a_missing_default_template_is_a_warning(tmp_path: Path) -> None:
    (warning,) = load(tmp_path, 'disposables.template = "gone"\n', other="").warnings
    assert (warning.key, warning.vm) == ("disposables.template", None)
    assert "gone" in warning.fact


def test_disks_that_the_template_writes_stay_with_it(tmp_path: Path) -> None:
    text = """
persist = ["/etc/ssh"]
additional_disks = [
    { path = "/srv/read.img", id = "read", ro = true },
    { path = "/srv/write.img", id = "write" },
]
"""
    derived = derive_from(template_of(tmp_path, text))
    assert [disk.id for disk in derived.config.additional_disks] == ["read"]
    assert derived.config.persist == ()
    assert "without the disks that 'work' writes to" in derived.notes
