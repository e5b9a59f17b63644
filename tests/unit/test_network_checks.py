"""What two VMs cannot both have, and what the machine lacks: `vmsilo check` names both places."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from vmsilod.config.load import Checks, Configuration, load_configuration
from vmsilod.config.network_checks import (
    NetworkFile,
    check_devices,
    find_host_overlaps,
    find_missing_nat,
)

DAEMON = Path(__file__).parents[2] / "daemon"
BARE = Checks(files=False, accounts=False, ownership=False)
SETTINGS = 'user = "nobody"\n'


def write(root: Path, vms: dict[str, str], settings: str = SETTINGS) -> None:
    (root / "vms.d").mkdir(parents=True, exist_ok=True)
    (root / "vmsilo.toml").write_text(settings)
    for name, text in vms.items():
        (root / f"vms.d/{name}.toml").write_text(text)


def load(root: Path, vms: dict[str, str], settings: str = SETTINGS) -> Configuration:
    write(root, vms, settings)
    return load_configuration([root], BARE)


def run_check(root: Path) -> list[str]:
    """The lines that the program prints, with "ETC" for the directory."""
    command = [sys.executable, "-m", "vmsilod.config.check", "--root", str(root)]
    environment = {"PYTHONPATH": str(DAEMON), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert result.returncode == (0 if "no problems" in result.stdout else 1)
    return result.stdout.replace(str(root), "ETC").splitlines()


def wan(lines: str, name: str = "wan") -> str:
    return f"[network.interfaces.{name}]\n{lines}\n"


def switch(lines: str, network: str = "office", name: str = "lan") -> str:
    return wan(f'type = "vm-switch"\nvm_network.name = "{network}"\n{lines}', name)


A, B = "ETC/vms.d/a.toml", "ETC/vms.d/b.toml"
WAN = "network.interfaces.wan"
LAN = "network.interfaces.lan"
CONFLICTS = {
    "address": (
        wan('addresses = ["10.0.0.1/24"]'),
        wan('addresses = ["10.0.0.2/24", "10.0.0.1/16"]'),
        [
            f"{A}: {WAN}.addresses: the address 10.0.0.1 is also that of interface wan of b "
            f"({B}: {WAN}.addresses)",
            "    give each interface an address of its own",
            f"{B}: {WAN}.addresses: the address 10.0.0.1 is also that of interface wan of a "
            f"({A}: {WAN}.addresses)",
            "    give each interface an address of its own",
        ],
    ),
    "address-v6": (
        wan('v6_addresses = ["fd00::1/64"]'),
        wan('v6_addresses = ["fd00:0::0:1/64"]', "eth0"),
        [
            f"{A}: {WAN}.v6_addresses: the address fd00::1 is also that of interface eth0 of b "
            f"({B}: network.interfaces.eth0.v6_addresses)",
            "    give each interface an address of its own",
            f"{B}: network.interfaces.eth0.v6_addresses: the address fd00::1 is also that of interface wan "
            f"of a ({A}: {WAN}.v6_addresses)",
            "    give each interface an address of its own",
        ],
    ),
    "mac": (
        wan('mac_address = "02:00:00:00:00:01"\ntap.bridge = "br9"'),
        wan('mac_address = "02-00-00-00-00-01"\ntap.bridge = "br9"'),
        [
            f"{A}: {WAN}.mac_address: the MAC address 02:00:00:00:00:01 is also that of interface wan of b "
            f"({B}: {WAN}.mac_address)",
            "    set another mac_address for one of them",
            f"{B}: {WAN}.mac_address: the MAC address 02:00:00:00:00:01 is also that of interface wan of a "
            f"({A}: {WAN}.mac_address)",
            "    set another mac_address for one of them",
        ],
    ),
    "tap": (
        wan(""),
        wan('tap.name = "a-0"'),
        [
            f"{A}: {WAN}: the TAP name a-0 is also that of interface wan of b ({B}: {WAN}.tap.name)",
            "    set another tap.name for one of them",
            f"{B}: {WAN}.tap.name: the TAP name a-0 is also that of interface wan of a ({A}: {WAN})",
            "    set another tap.name for one of them",
        ],
    ),
    "subnet": (
        wan('tap.host_address = "198.18.0.254/16"'),
        wan('tap.host_address = "198.18.9.254/24"'),
        [
            f"{A}: {WAN}.tap.host_address: the subnet 198.18.0.0/16 overlaps 198.18.9.0/24 of interface wan "
            f"of b ({B}: {WAN}.tap.host_address)",
            "    give each interface a subnet of its own",
            f"{B}: {WAN}.tap.host_address: the subnet 198.18.9.0/24 overlaps 198.18.0.0/16 of interface wan "
            f"of a ({A}: {WAN}.tap.host_address)",
            "    give each interface a subnet of its own",
        ],
    ),
    "address-in-subnet": (
        wan('tap.host_address_v6 = "2001:db8::fe/64"'),
        wan('v6_addresses = ["2001:db8::2/64"]'),
        [
            f"{A}: {WAN}.tap.host_address_v6: the subnet 2001:db8::/64 has the address 2001:db8::2 of "
            f"interface wan of b ({B}: {WAN}.v6_addresses)",
            "    give each interface a subnet of its own",
            f"{B}: {WAN}.v6_addresses: the address 2001:db8::2 is in the subnet 2001:db8::/64 of "
            f"interface wan of a ({A}: {WAN}.tap.host_address_v6)",
            "    give each interface an address of its own",
        ],
    ),
    "served": (
        switch('addresses = ["10.7.0.1/24"]\nvm_network.routes = ["0.0.0.0/0"]'),
        switch('addresses = ["10.7.0.2/24"]\nvm_network.routes = ["0.0.0.0/0"]'),
        [
            f"{A}: {LAN}.vm_network.routes: the network 0.0.0.0/0 is also that of interface lan of b "
            f"({B}: {LAN}.vm_network.routes)",
            "    leave it to one VM of the network",
            f"{B}: {LAN}.vm_network.routes: the network 0.0.0.0/0 is also that of interface lan of a "
            f"({A}: {LAN}.vm_network.routes)",
            "    leave it to one VM of the network",
        ],
    ),
}


@pytest.mark.parametrize("kind", CONFLICTS)
def test_conflict_is_told_of_both_with_both_places(tmp_path: Path, kind: str) -> None:
    first, second, expected = CONFLICTS[kind]
    configuration = load(tmp_path, {"a": first, "b": second, "c": wan("", "eth7")})
    assert set(configuration.broken) == {"a", "b"}
    assert set(configuration.vms) == {"c"}
    lines = [line for line in run_check(tmp_path) if "br9" not in line and "it is there" not in line]
    assert lines == expected


def test_tap_with_the_name_of_another_device_of_the_host(tmp_path: Path) -> None:
    settings = SETTINGS + 'host_networking.nat = {enable = true, interface = "up0"}\n'
    write(tmp_path, {"a": wan('tap.name = "br9"'), "b": wan('tap.name = "up0"')}, settings)
    write(tmp_path, {"c": wan('tap.bridge = "br9"')}, settings)
    lines = run_check(tmp_path)
    hint = "    set another tap.name"
    assert lines[:6] == [
        "warning: ETC/vmsilo.toml: host_networking.nat.interface: this machine has no network interface "
        "'up0' now",
        "    no VM reaches the internet until there is one",
        f"{A}: {WAN}.tap.name: the TAP name br9 is that of another device of the host "
        f"(ETC/vms.d/c.toml: {WAN}.tap.bridge)",
        hint,
        f"{B}: {WAN}.tap.name: the TAP name up0 is that of another device of the host "
        "(ETC/vmsilo.toml: host_networking.nat.interface)",
        hint,
    ]


def test_one_vm_cannot_have_the_same_twice(tmp_path: Path) -> None:
    same = 'mac_address = "02:00:00:00:00:01"\naddresses = ["10.0.0.1/24"]'
    configuration = load(tmp_path, {"a": wan(same) + switch(same)})
    assert [problem.fact.partition(" (")[0] for problem in configuration.problems] == [
        "the MAC address 02:00:00:00:00:01 is also that of interface lan",
        "the MAC address 02:00:00:00:00:01 is also that of interface wan",
        "the address 10.0.0.1 is also that of interface lan",
        "the address 10.0.0.1 is also that of interface wan",
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # Networks of VMs, links of macvtaps and the host have nothing to do with one another.
        (switch('addresses = ["10.0.0.1/24"]', "one"), switch('addresses = ["10.0.0.1/24"]', "two")),
        (wan('addresses = ["10.0.0.1/24"]'), switch('addresses = ["10.0.0.1/24"]')),
        (
            wan('type = "macvtap"\nmacvtap.link = "e0"\naddresses = ["10.0.0.1/24"]'),
            wan('type = "macvtap"\nmacvtap.link = "e1"\naddresses = ["10.0.0.1/24"]'),
        ),
        (
            wan('mac_address = "02:00:00:00:00:01"\ntap.bridge = "b0"'),
            wan('mac_address = "02:00:00:00:00:01"\ntap.bridge = "b1"'),
        ),
        # TAPs that end at the host are links of their own.
        (
            wan('mac_address = "02:00:00:00:00:01"\ntap.host_address = "10.0.0.254/24"'),
            wan('mac_address = "02:00:00:00:00:01"\ntap.host_address = "10.0.1.254/24"'),
        ),
        (
            wan('tap = {host_address = "10.0.0.254/24", host_address_v6 = "fd00::fe/64"}'),
            wan('tap = {host_address = "10.0.1.254/24", host_address_v6 = "fd00:0:0:1::fe/64"}'),
        ),
    ],
)
def test_what_two_vms_can_both_have(tmp_path: Path, first: str, second: str) -> None:
    assert load(tmp_path, {"a": first, "b": second}).problems == ()


def test_every_one_of_many_is_told_and_hundreds_are_no_matter(tmp_path: Path) -> None:
    vms = {f"vm-{n}": wan(f'tap.host_address = "10.{n // 250}.{n % 250}.254/24"') for n in range(500)}
    assert load(tmp_path, vms).problems == ()
    configuration = load(tmp_path, {name: wan('tap.host_address = "10.0.0.254/24"') for name in vms})
    assert len(configuration.broken) == 500
    assert len(configuration.problems) < 1500


def test_vm_that_depends_on_one_of_a_conflict_is_broken_too(tmp_path: Path) -> None:
    same = wan('addresses = ["10.0.0.1/24"]')
    configuration = load(tmp_path, {"a": same, "b": same, "c": 'depends_on = ["a"]'})
    assert configuration.broken["c"][0].fact == "names a, which has problems of its own"


def test_place_is_the_drop_in_that_says_it(tmp_path: Path) -> None:
    (tmp_path / "vms.d/b.toml.d").mkdir(parents=True)
    (tmp_path / "vms.d/b.toml.d/x.toml").write_text(wan('tap.name = "a-0"'))
    first, second = load(tmp_path, {"a": wan(""), "b": wan("")}).problems
    assert f"({tmp_path}/vms.d/b.toml.d/x.toml: {WAN}.tap.name)" in first.fact
    assert second.file == f"{tmp_path}/vms.d/b.toml.d/x.toml"


def test_bridge_and_link_must_be_there(tmp_path: Path) -> None:
    write(tmp_path, {"a": wan('tap.bridge = "br9"'), "b": wan('type = "macvtap"\nmacvtap.link = "e9"')})
    assert run_check(tmp_path) == [
        f"{A}: {WAN}.tap.bridge: this machine has no network interface 'br9'",
        "    the VM can be started as soon as it is there",
        f"{B}: {WAN}.macvtap.link: this machine has no network interface 'e9'",
        "    the VM can be started as soon as it is there",
    ]
    assert load_configuration([tmp_path], BARE).problems == ()


def network_file(root: Path, text: str) -> NetworkFile:
    vm = load(root, {"a": text}).vms["a"]
    return NetworkFile("a", vm.network, lambda key: ".".join(key[-1:]))


def test_bridge_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "sys/br0/bridge").mkdir(parents=True)
    (tmp_path / "sys/eth0").mkdir()
    bridge = network_file(tmp_path, wan('tap.bridge = "br0"'))
    assert check_devices(bridge, tmp_path / "sys") == []
    other = network_file(tmp_path, wan('tap.bridge = "eth0"'))
    assert [str(problem) for problem in check_devices(other, tmp_path / "sys")] == [
        f"bridge: {WAN}.tap.bridge: 'eth0' is not a bridge"
    ]
    link = network_file(tmp_path, wan('type = "macvtap"\nmacvtap.link = "eth0"'))
    assert check_devices(link, tmp_path / "sys") == []


def test_nat_interface_may_come_later(tmp_path: Path) -> None:
    text = SETTINGS + 'host_networking.nat = {enable = true, interface = "up0"}\n'
    settings = load(tmp_path, {}, text).settings
    assert settings is not None
    assert len(find_missing_nat(settings, "f", tmp_path)) == 1
    (tmp_path / "up0").mkdir()
    assert find_missing_nat(settings, "f", tmp_path) == []


def test_gateway_at_which_nobody_is_gets_a_warning(tmp_path: Path) -> None:
    text = wan(
        'tap.host_address = "203.0.113.254/24"\naddresses = ["203.0.113.1/24"]\n'
        'routes."0.0.0.0/0" = { via = "203.0.113.2" }\nroutes."10.9.0.0/16" = { via = "203.0.113.254" }'
    )
    write(tmp_path, {"a": text})
    assert run_check(tmp_path)[:2] == [
        f"warning: {A}: {WAN}.routes: nobody answers as the gateway 203.0.113.2 of 0.0.0.0/0",
        "    the host's address on this interface is 203.0.113.254",
    ]
    assert set(load_configuration([tmp_path], BARE).vms) == {"a"}


def test_subnet_that_the_host_is_in_already_gets_a_warning(tmp_path: Path) -> None:
    """/proc/net of a host with a LAN, a default route by it, docker's bridge and a TAP of ours."""
    proc, sysfs = tmp_path / "proc", tmp_path / "sys"
    (sysfs / "a-0").mkdir(parents=True)
    (sysfs / "a-0/ifalias").write_text("vmsilo:a:wan\n")
    proc.mkdir()
    header = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT"
    rows = (
        "eth0 00000000 0100A8C0 0003 0 0 0 00000000 0 0 0",
        "eth0 0000A8C0 00000000 0001 0 0 0 00FFFFFF 0 0 0",
        "docker0 000011AC 00000000 0001 0 0 0 0000FFFF 0 0 0",
        "a-0 0001A8C0 00000000 0001 0 0 0 00FFFFFF 0 0 0",
    )
    (proc / "route").write_text("\n".join((header, *rows)) + "\n")
    zero = "0" * 32
    rest = "00000100 00000001 00000000 00000001"
    (proc / "ipv6_route").write_text(
        f"fd{'0' * 30} 40 {zero} 00 {zero} {rest} eth0\nfe80{'0' * 28} 40 {zero} 00 {zero} {rest} eth0\n"
        f"{zero} 00 {zero} 00 fe80{'0' * 27}1 {rest} eth0\nff{'0' * 30} 08 {zero} 00 {zero} {rest} eth0\n"
    )

    def warn(host: str, host_v6: str) -> list[str]:
        text = wan(f'tap = {{host_address = "{host}", host_address_v6 = "{host_v6}"}}')
        files = {"a": network_file(tmp_path, text)}
        return [problem.fact for problem in find_host_overlaps(files, proc, sysfs)]

    assert warn("192.168.1.254/24", "fd00:0:0:1::fe/64") == []
    assert warn("192.168.0.254/28", "fd00::fe/112") == [
        "the subnet 192.168.0.240/28 overlaps 192.168.0.0/24, which the host reaches by eth0",
        "the subnet fd00::/112 overlaps fd00::/64, which the host reaches by eth0",
    ]
    assert warn("172.17.4.1/24", "fd01::1/64") == [
        "the subnet 172.17.4.0/24 overlaps 172.17.0.0/16, which the host reaches by docker0"
    ]
