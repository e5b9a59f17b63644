"""[network] of a VM's file and [host_networking] of the global one: what one file alone may say."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_network
from typing import TYPE_CHECKING

import pytest
from vmsilod.config.load import Checks, Configuration, load_configuration
from vmsilod.config.model import VmConfig
from vmsilod.network.names import derive_link_local, derive_mac, derive_tap

if TYPE_CHECKING:
    from pathlib import Path

BARE = Checks(files=False, accounts=False, ownership=False)
NAT = '[host_networking.nat]\nenable = true\ninterface = "eth0"\n'


def load(tmp_path: Path, text: str, settings: str = "") -> Configuration:
    (tmp_path / "vms.d").mkdir(exist_ok=True)
    (tmp_path / "vmsilo.toml").write_text('user = "david"\n' + settings)
    (tmp_path / "vms.d/a.toml").write_text(text)
    return load_configuration([tmp_path], BARE)


def load_vm(tmp_path: Path, text: str) -> VmConfig:
    configuration = load(tmp_path, text)
    assert configuration.problems == ()
    return configuration.vms["a"]


def test_the_options_as_the_original_spells_them(tmp_path: Path) -> None:
    vm = load_vm(
        tmp_path,
        """
        [network]
        nameservers = ["1.1.1.1", "2606:4700:4700::1111"]
        [network.interfaces.wan]
        type = "tap"
        mac_address = "02-00-00-00-00-AB"
        tap.name = "mytap"
        tap.host_address = "10.0.0.254/24"
        tap.host_address_v6 = "FD00:0::fe/64"
        addresses = ["10.0.0.1/24"]
        routes."0.0.0.0/0" = { via = "10.0.0.254" }
        v6_addresses = ["fd00::0:1/64"]
        v6_routes."::/0" = { via = "fd00::fe" }
        [network.interfaces.internal]
        type = "vm-switch"
        vm_network.name = "office"
        vm_network.receive_broadcast = true
        vm_network.routes = ["192.168.1.0/24", "fd01::/64"]
        addresses = ["192.168.77.1/24"]
        [network.interfaces.lan]
        type = "macvtap"
        macvtap.link = "enp3s0"
        dhcp = true
        """,
    )
    assert list(vm.network.interfaces) == ["wan", "internal", "lan"]
    wan = vm.network.interfaces["wan"]
    assert (wan.mac_address, wan.tap.name) == ("02:00:00:00:00:ab", "mytap")
    assert [str(address) for address in wan.host_addresses] == ["10.0.0.254/24", "fd00::fe/64"]
    assert [str(address) for address in wan.all_addresses] == ["10.0.0.1/24", "fd00::1/64"]
    assert wan.all_routes == (("0.0.0.0/0", "10.0.0.254"), ("::/0", "fd00::fe"))
    assert vm.network.interfaces["internal"].vm_network.routes == ("192.168.1.0/24", "fd01::/64")


def test_defaults_are_a_tap_and_nothing_open(tmp_path: Path) -> None:
    assert not load_vm(tmp_path, "").network.interfaces
    network = load_vm(tmp_path, "[network.interfaces.eth0]").network
    interface = network.interfaces["eth0"]
    assert (interface.type, interface.dhcp, interface.addresses, interface.routes) == ("tap", False, (), {})
    assert interface.tap.bridge is None
    assert (network.allow, network.nameservers, network.forward_ports) == ((), (), ())


def test_drop_in_adds_an_interface_behind_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "vms.d/a.toml.d").mkdir(parents=True)
    (tmp_path / "vms.d/a.toml.d/x.toml").write_text(
        "[network.interfaces.a]\n[network.interfaces.z]\ndhcp = true\n"
    )
    vm = load_vm(tmp_path, "[network.interfaces.z]\n[network.interfaces.b]\n")
    assert list(vm.network.interfaces) == ["z", "b", "a"]
    assert vm.network.interfaces["z"].dhcp


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ('"192.168.1.0/24"', ("192.168.1.0/24", None, None)),
        ('"10.0.0.5"', ("10.0.0.5/32", None, None)),
        ('"10.0.0.5:443/tcp"', ("10.0.0.5/32", "tcp", (443, 443))),
        ('"10.0.0.0/8:80-90/udp"', ("10.0.0.0/8", "udp", (80, 90))),
        ('"fd00::/8"', ("fd00::/8", None, None)),
        ('"[fd00::5]:443/tcp"', ("fd00::5/128", "tcp", (443, 443))),
        ('"[fd00::5]"', ("fd00::5/128", None, None)),
        ('{to = "192.168.1.7", port = 631, protocol = "tcp"}', ("192.168.1.7/32", "tcp", (631, 631))),
        ('{to = "192.168.1.7", port = "80-90", protocol = "udp"}', ("192.168.1.7/32", "udp", (80, 90))),
        ('{to = "192.168.1.0/24", protocol = "icmp"}', ("192.168.1.0/24", "icmp", None)),
    ],
)
def test_allow_is_short_or_a_table(tmp_path: Path, entry: str, expected: tuple[object, ...]) -> None:
    vm = load_vm(tmp_path, f"network.allow = [{entry}]")
    (allow,) = vm.network.allow
    assert (allow.to, allow.protocol, allow.ports) == expected
    assert VmConfig.from_json(vm.to_json()) == vm


@pytest.mark.parametrize(
    ("entry", "key", "fact"),
    [
        ('"192.168.1.5/24"', "network.allow.0.to", "'192.168.1.5/24' is an address in 192.168.1.0/24"),
        ('"10.0.0.5:443"', "network.allow.0", "names ports without a protocol: 10.0.0.5:443/tcp"),
        ('"10.0.0.5:443/"', "network.allow.0", "names ports without a protocol: 10.0.0.5:443/tcp"),
        ('"10.0.0.5:443/sctp"', "network.allow.0.protocol", "'sctp' is not one of 'tcp', 'udp' or 'icmp'"),
        ('"10.0.0.5:90-80/tcp"', "network.allow.0.port", "'90-80' ends before it begins"),
        ('"10.0.0.5:0/tcp"', "network.allow.0.port", "0 is not a port: 1 to 65535"),
        ('"10.0.0.5:/tcp"', "network.allow.0.port", "'' is not a port or a range such as 80-90"),
        ('"10.0.0.5:65536/tcp"', "network.allow.0.port", "65536 is not a port: 1 to 65535"),
        ('"host.example"', "network.allow.0", "'host.example' is not a destination such as 192.168.1.0/24"),
        ('"fe80::1%eth0"', "network.allow.0.to", "has a zone"),
        ('{to = "10.0.0.5", port = 80}', "network.allow.0", "port 80 needs its protocol, tcp or udp"),
        ('{to = "10.0.0.5", port = 80, protocol = "icmp"}', "network.allow.0", "icmp has no ports"),
        ('{to = "10.0.0.5", port = true}', "network.allow.0.port", "is not a port or a range"),
        ('{port = 80, protocol = "tcp"}', "network.allow.0.to", "required, but not set"),
        ('{to = "10.0.0.5", prot = "tcp"}', "network.allow.0", "unknown key 'prot'"),
        ("5", "network.allow.0", "5 is not a table"),
    ],
)
def test_what_cannot_be_allowed(tmp_path: Path, entry: str, key: str, fact: str) -> None:
    (problem,) = load(tmp_path, f"network.allow = [{entry}]").problems
    assert problem.key == key
    assert fact in problem.fact


WAN = "network.interfaces.wan"


@pytest.mark.parametrize(
    ("lines", "key", "fact"),
    [
        ('type = "bridge"', f"{WAN}.type", "'bridge' is not one of 'tap', 'vm-switch' or 'macvtap'"),
        ('mac_address = "02:00:00:00:00"', f"{WAN}.mac_address", "is not a MAC address"),
        ('mac_address = "03:00:00:00:00:01"', f"{WAN}.mac_address", "is a group's MAC address"),
        ('mac_address = "00:00:00:00:00:00"', f"{WAN}.mac_address", "is no interface's MAC address"),
        ('tap.name = "0123456789abcdef"', f"{WAN}.tap.name", "is not a name of a network interface"),
        ('tap.name = "a/b"', f"{WAN}.tap.name", "is not a name of a network interface"),
        ('tap.name = "all"', f"{WAN}.tap.name", "'all' is a name that the kernel uses itself"),
        ('tap.bridge = "br*"', f"{WAN}.tap.bridge", "is not a name of a network interface"),
        ('tap.hostAddress = "10.0.0.254/24"', f"{WAN}.tap", "unknown key 'hostAddress'"),
        ('tap.host_address = "10.0.0.254"', f"{WAN}.tap.host_address", "lacks its prefix: 10.0.0.254/24"),
        ('tap.host_address = "fd00::1/64"', f"{WAN}.tap.host_address", "is not an IPv4 address"),
        ('tap.host_address_v6 = "10.0.0.1/8"', f"{WAN}.tap.host_address_v6", "is not an IPv6 address"),
        ('addresses = ["10.0.0.0/24"]', f"{WAN}.addresses.0", "is the address of the network itself"),
        ('addresses = ["10.0.0.255/24"]', f"{WAN}.addresses.0", "is the broadcast address of its network"),
        ('addresses = ["224.0.0.1/4"]', f"{WAN}.addresses.0", "is a multicast address"),
        ('addresses = ["127.0.0.2/8"]', f"{WAN}.addresses.0", "is a loopback address"),
        ('addresses = ["0.1.2.3/24"]', f"{WAN}.addresses.0", "is an address of 0.0.0.0/8"),
        ('addresses = ["240.0.0.1/24"]', f"{WAN}.addresses.0", "is a reserved address"),
        ('addresses = ["10.0.0.1/24", "10.0.0.1/24"]', f"{WAN}.addresses", "names 10.0.0.1/24 more than"),
        ('v6_addresses = ["fe80::1/64"]', f"{WAN}.v6_addresses.0", "is link-local"),
        ('v6_addresses = ["::ffff:10.0.0.1/96"]', f"{WAN}.v6_addresses.0", "IPv4 address in IPv6 form"),
        ('v6_addresses = ["fd00::1%a/64"]', f"{WAN}.v6_addresses.0", "is not an IPv6 address"),
        ('routes."0.0.0.0/0" = {}', f"{WAN}.routes.0.0.0.0/0.via", "required, but not set"),
        ('routes."0.0.0.0/0" = { gw = "10.0.0.1", via = "10.0.0.1" }', f"{WAN}.routes.0.0.0.0/0", "'gw'"),
        ('routes."::/0" = { via = "10.0.0.1" }', f"{WAN}.routes.::/0", "'::/0' is not IPv4"),
        (
            'routes."10.0.0.1/8" = { via = "10.0.0.1" }',
            f"{WAN}.routes.10.0.0.1/8",
            "address in 10.0.0.0/8",
        ),
        ('v6_routes."::/0" = { via = "10.0.0.1" }', f"{WAN}.v6_routes.::/0.via", "'10.0.0.1' is not IPv6"),
        ('vm_network.name = "lan"', WAN, "vm_network is for type 'vm-switch', this is 'tap'"),
        ('macvtap.link = "eth0"', WAN, "macvtap is for type 'macvtap', this is 'tap'"),
        (
            'tap = {bridge = "b", host_address = "10.0.0.1/8"}',
            WAN,
            "host_address and tap.bridge exclude",
        ),
        ('tap = {bridge = "b", host_address_v6 = "fd00::1/8"}', WAN, "host_address and tap.bridge exclude"),
        ('type = "vm-switch"', WAN, "type 'vm-switch' needs vm_network.name"),
        ('type = "vm-switch"\nvm_network.name = "n"', WAN, "type 'vm-switch' needs an address"),
        (
            'type = "vm-switch"\nvm_network.name = "N"',
            f"{WAN}.vm_network.name",
            "is not a name of a network",
        ),
        ('type = "vm-switch"\nvm_network.name = "n"\ndhcp = true', WAN, "dhcp is not for type 'vm-switch'"),
        ('type = "vm-switch"\ntap.bridge = "b"', WAN, "are not for type 'vm-switch'"),
        ('type = "macvtap"', WAN, "type 'macvtap' needs macvtap.link"),
        (
            'tap.host_address = "10.0.0.254/24"\naddresses = ["10.0.1.1/24"]',
            WAN,
            "10.0.1.1 is outside the host's subnet 10.0.0.0/24",
        ),
        (
            'tap.host_address = "10.0.0.254/24"\naddresses = ["10.0.0.254/24"]',
            WAN,
            "10.0.0.254 is the host's own address on this interface",
        ),
        (
            'tap.host_address = "10.0.0.254/24"\nv6_addresses = ["fd00::1/64"]',
            WAN,
            "has IPv6 addresses, but the host has none: tap.host_address_v6",
        ),
        (
            'addresses = ["10.0.0.1/24"]\nroutes."0.0.0.0/0" = { via = "10.0.1.254" }',
            WAN,
            "the gateway 10.0.1.254 of 0.0.0.0/0 is outside the subnet (10.0.0.0/24)",
        ),
        (
            'routes."0.0.0.0/0" = { via = "10.0.1.254" }',
            WAN,
            "the gateway 10.0.1.254 of 0.0.0.0/0 is outside the subnet (no IPv4 address)",
        ),
        (
            'v6_addresses = ["fd00::1/64"]\nv6_routes."::/0" = { via = "fd01::1" }',
            WAN,
            "the gateway fd01::1 of ::/0 is outside the subnet (fd00::/64)",
        ),
        (
            'addresses = ["10.0.0.1/24"]\nroutes."0.0.0.0/0" = { via = "10.0.0.1" }',
            WAN,
            "the gateway 10.0.0.1 of 0.0.0.0/0 is the interface's own address",
        ),
    ],
)
def test_what_an_interface_cannot_be(tmp_path: Path, lines: str, key: str, fact: str) -> None:
    configuration = load(tmp_path, f"[{WAN}]\n{lines}")
    (problem,) = configuration.problems
    assert problem.key == key
    assert fact in problem.fact
    assert "a" in configuration.broken


@pytest.mark.parametrize(
    "lines",
    [
        'addresses = ["10.0.0.0/31"]\nroutes."0.0.0.0/0" = { via = "10.0.0.1" }',
        'dhcp = true\nroutes."10.9.0.0/16" = { via = "192.168.1.1" }',
        'v6_addresses = ["fd00::1/64"]\nv6_routes."::/0" = { via = "fe80::1" }',
        'tap.host_address = "10.0.0.254/24"\ndhcp = true',
    ],
)
def test_what_an_interface_can_be(tmp_path: Path, lines: str) -> None:
    load_vm(tmp_path, f"[{WAN}]\n{lines}")


@pytest.mark.parametrize("name", ["0123456789abcdef", "a b", "a/b", "..", "lo", "42", "-x", "", "wän"])
def test_name_of_an_interface_must_be_one_for_linux(tmp_path: Path, name: str) -> None:
    (problem,) = load(tmp_path, f'[network.interfaces."{name}"]').problems
    assert problem.key == f"network.interfaces.{name}"
    assert "is a name that the kernel" in problem.fact or "is not a name of a network" in problem.fact


def test_interfaces_are_as_many_as_a_machine_takes(tmp_path: Path) -> None:
    tables = [f"[network.interfaces.eth{number}]\n" for number in range(9)]
    load_vm(tmp_path, "".join(tables[:8]))
    (problem,) = load(tmp_path, "".join(tables)).problems
    assert (problem.key, problem.fact) == ("network.interfaces", "9 interfaces, above 8")


def test_unknown_key_below_a_name_of_the_file_names_the_near_one(tmp_path: Path) -> None:
    (problem,) = load(tmp_path, f"[{WAN}]\nadresses = []").problems
    assert str(problem).endswith("wan: unknown key 'adresses' (did you mean 'addresses'?)")
    (problem,) = load(tmp_path, f"[{WAN}]\ntap = {{brigde = 'b'}}").problems
    assert "did you mean 'bridge'" in problem.fact


@pytest.mark.parametrize("server", ["dns.example", "1.1.1.1/32", "0.0.0.0", "224.0.0.1", "fe80::1%eth0"])
def test_nameserver_is_an_address(tmp_path: Path, server: str) -> None:
    (problem,) = load(tmp_path, f'network.nameservers = ["{server}"]').problems
    assert problem.key == "network.nameservers.0"


@pytest.mark.parametrize(
    ("settings", "key", "fact"),
    [
        ("host_networking.nat.enable = true", "host_networking.nat", "enable needs the interface"),
        ('host_networking.nat.interface = "a b"', "host_networking.nat.interface", "is not a name of a"),
        ("host_networking.nat.enabled = true", "host_networking.nat", "did you mean 'enable'"),
    ],
)
def test_nat_needs_its_interface(tmp_path: Path, settings: str, key: str, fact: str) -> None:
    (problem,) = load(tmp_path, "", settings).problems
    assert problem.key == key
    assert fact in problem.fact


def test_value_with_escapes_in_it_is_shown_escaped(tmp_path: Path) -> None:
    for text in (
        'network.nameservers = ["\\u001b[2J"]',
        'network.allow = ["\\u001b[2J"]',
        'network.allow = [{to = "\\u001b"}]',
        '[network.interfaces."\\u001b[2J"]',
        '[network.interfaces.a]\nroutes."\\u001b[2J" = {}',
        '[network.interfaces.a]\naddresses = ["10.0.0.1/24\\n"]',
        '[network.interfaces.a]\nmac_address = "02:00:00:00:00:01\\n"',
        '[network.interfaces.a]\ntap.name = "x\\n"',
        '[network.interfaces.a]\ntype = "vm-switch"\nvm_network.name = "x\\n"',
        'network.allow = [{to = "10.0.0.1", port = "80\\n", protocol = "tcp"}]',
    ):
        configuration = load(tmp_path, text)
        assert configuration.problems, text
        assert all(str(problem).isprintable() for problem in configuration.problems)


def test_nat_of_the_host(tmp_path: Path) -> None:
    settings = load(tmp_path, "", NAT).settings
    assert settings is not None
    assert (settings.host_networking.nat.enable, settings.host_networking.nat.interface) == (True, "eth0")


def test_only_the_rules_of_the_host_change_while_a_vm_runs(tmp_path: Path) -> None:
    text = '[network]\nnameservers = ["1.1.1.1"]\n[network.interfaces.a]\n[network.interfaces.b]\n'
    vm = load_vm(tmp_path, text)
    opened = load_vm(tmp_path, text.replace("[network]", '[network]\nallow = ["10.0.0.0/8"]'))
    assert opened.network.allow
    assert opened.digest() == vm.digest()
    assert VmConfig.from_json(vm.to_json()).digest() == vm.digest()
    for other in (
        text.replace("1.1.1.1", "1.0.0.1"),
        text.replace("interfaces.a", "interfaces.c"),
        text + 'addresses = ["10.0.0.1/24"]',
        text + 'tap.bridge = "br0"',
        '[network]\nnameservers = ["1.1.1.1"]\n[network.interfaces.b]\n[network.interfaces.a]\n',
    ):
        assert load_vm(tmp_path, other).digest() != vm.digest(), other


def test_name_of_a_tap_fits_the_kernel() -> None:
    assert derive_tap("banking", 0) == "banking-0"
    assert derive_tap("thirteenchars", 1) == "thirteenchars-1"
    long = {derive_tap(f"a-very-long-name-{number}", index) for number in range(500) for index in range(4)}
    assert len(long) == 2000
    assert all(len(name) == 15 and name.startswith("a-very-") for name in long)
    # The rule is a promise: who names a TAP in rules of his own must find it there after an upgrade.
    assert derive_tap("fourteen-chars", 0) == "fourte-850b64fb"


def test_mac_is_of_one_machine_locally_administered_and_stays(tmp_path: Path) -> None:
    macs = {derive_mac("banking", f"eth{number}") for number in range(1000)}
    assert len(macs) == 1000
    assert all(int(mac[:2], 16) & 3 == 2 for mac in macs)
    assert derive_mac("banking", "wan") == "3e:e2:0c:26:9e:86"


def test_link_local_address_as_the_guest_forms_it() -> None:
    assert derive_link_local("02:00:00:00:00:01") == IPv6Address("fe80::ff:fe00:1")
    assert derive_link_local("3e:e2:0c:26:9e:86") == IPv6Address("fe80::3ce2:cff:fe26:9e86")
    assert derive_link_local("3e:e2:0c:26:9e:86") in ip_network("fe80::/64")
