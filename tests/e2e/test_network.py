"""Interfaces as a real guest has them when its first command runs. The networks are QEMU's own user-mode
ones, whose gateway answers pings, DHCP and DNS and sends router advertisements.
"""

from __future__ import annotations

import json
import subprocess
from ipaddress import ip_interface, ip_network
from typing import TYPE_CHECKING, Any

import pytest
from vmsilo_image.cpio import secret_archive
from vmsilod.network.guest import plan_guest_files, plan_ifnames
from vmsilod.network.plan import Port, Route

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.container import Container

# By its position the first would be eth0 and the second eth1.
PORTS = (
    Port(
        vm="nets",
        interface="eth1",
        tap="nets-0",
        mac="52:54:00:00:00:01",
        host_addresses=(ip_interface("10.0.2.2/24"),),
        addresses=(ip_interface("10.0.2.77/24"), ip_interface("fd00:2::77/64")),
        routes=(Route(ip_network("0.0.0.0/0"), "10.0.2.2"), Route(ip_network("::/0"), "fd00:2::2")),
        nameservers=("10.0.2.3",),
    ),
    Port(vm="nets", interface="eth0", tap="nets-1", mac="52:54:00:00:00:02", bridge="br0", dhcp=True),
)
ARGUMENTS = (
    *("-netdev", "user,id=net0,ipv6-prefix=fd00:2::,ipv6-host=fd00:2::2"),
    *("-device", "virtio-net-pci,romfile=,netdev=net0,mac=52:54:00:00:00:01"),
    *("-netdev", "user,id=net1,net=10.0.3.0/24,dhcpstart=10.0.3.55,ipv6-prefix=fd00:3::"),
    *("-device", "virtio-net-pci,romfile=,netdev=net1,mac=52:54:00:00:00:02"),
)
UNIT = "vmsilo-nets-vm.service"
# QEMU asks the name server of its own network namespace, where only this is.
NAME_SERVER = """
import os, socket, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("127.0.0.1", 53))
print("up", flush=True)
while True:
    query, peer = s.recvfrom(512)
    end = query.index(b"\\0", 12) + 5
    answers = query[end - 4 : end - 2] == b"\\0\\1"
    head = query[:2] + b"\\x81\\x80\\0\\1" + (b"\\0\\1" if answers else b"\\0\\0") + bytes(4)
    record = b"\\xc0\\x0c\\0\\1\\0\\1" + (60).to_bytes(4, "big") + b"\\0\\4" + bytes([192, 0, 2, 7])
    s.sendto(head + query[12:end] + (record if answers else b""), peer)
"""


def in_nets(host: Container, command: str, *, check: bool = True) -> str:
    return host.run(["vm-run", "nets", "sh", "-c", command], user="user", check=check).stdout


def addresses_of(host: Container) -> dict[str, set[str]]:
    links: list[dict[str, Any]] = json.loads(in_nets(host, "ip -j address"))
    return {
        link["ifname"]: {f"{each['local']}/{each['prefixlen']}" for each in link["addr_info"]}
        for link in links
    }


@pytest.fixture(scope="module")
def nets(host: Container) -> Iterator[Container]:
    """The VM nets, not started yet."""
    archive = secret_archive("0" * 64, None, plan_guest_files(PORTS))
    (host.root / "root/network.cpio").write_bytes(archive)
    host.run("cat /var/lib/vmsilo/images/default/current/initrd /root/network.cpio > /var/lib/initrd-nets")
    host.run("mv /etc/resolv.conf /root/resolv.conf", check=False)
    host.write("/etc/resolv.conf", "nameserver 127.0.0.1\n")
    host.write(
        f"/etc/systemd/system/{UNIT}.d/name-server.conf",
        "[Service]\nRestrictAddressFamilies=AF_INET AF_INET6\n",
    )
    names = [f"vmsilo.ifname={name},{mac}" for name, mac in plan_ifnames(PORTS)]
    host.write(
        "/etc/vmsilo/vms.d/nets.toml",
        'memory = 768\ninitramfs = "/var/lib/initrd-nets"\nvmm = "qemu"\n'
        f"kernel_params = {json.dumps(names)}\n"
        f'[qemu]\nmachine = "q35"\nextra_args = {json.dumps(ARGUMENTS)}\n',
    )
    host.run("systemctl daemon-reload")
    host.wait_until("test -S /run/vmsilo/nets-command.socket")
    yield host
    host.run("vm-stop --force nets", check=False)
    host.run("rm /etc/resolv.conf; mv /root/resolv.conf /etc/resolv.conf", check=False)


def test_the_first_command_finds_addresses_of_every_kind_and_no_advertised_ones(nets: Container) -> None:
    addresses = addresses_of(nets)
    assert addresses["eth1"] == {"10.0.2.77/24", "fd00:2::77/64", "fe80::5054:ff:fe00:1/64"}
    assert addresses["eth0"] == {"10.0.3.55/24"}
    assert addresses.keys() == {"lo", "eth1", "eth0"}


def test_names_are_right_before_systemd_starts(nets: Container) -> None:
    kernel = nets.run(["vm-run", "--root", "nets", "dmesg"], user="user").stdout.splitlines()
    renamed = [number for number, line in enumerate(kernel) if "renamed from" in line]
    started = next(number for number, line in enumerate(kernel) if "systemd[1]" in line)
    assert renamed
    assert renamed[-1] < started


def test_packets_pass(nets: Container) -> None:
    routes: list[dict[str, Any]] = json.loads(in_nets(nets, "ip -j route show default dev eth1"))
    assert [route["gateway"] for route in routes] == ["10.0.2.2"]
    for gateway in ("10.0.2.2", "10.0.3.2"):
        ping = nets.run(["vm-run", "--root", "nets", "busybox", "ping", "-c1", gateway], user="user")
        assert "1 packets received" in ping.stdout


def test_names_are_looked_up(nets: Container) -> None:
    pid = nets.run(["systemctl", "show", "-P", "MainPID", UNIT]).stdout.strip()
    server = nets.popen(
        ["nsenter", "-t", pid, "-n", "python3", "-c", NAME_SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == b"up\n"
        assert in_nets(nets, "getent ahostsv4 vmsilo.example").split()[0] == "192.0.2.7"
    finally:
        server.communicate()  # its input ends, and so does it


def test_an_offline_guest_runs_nothing_for_networks(demo: Container) -> None:
    shown = demo.run(
        ["vm-run", "demo", "systemctl", "is-active", "systemd-networkd", "systemd-resolved"],
        user="user",
        check=False,
    )
    assert shown.stdout.split() == ["inactive", "inactive"]
    assert (
        demo.run(["vm-run", "demo", "pgrep", "-fc", "networkd|resolved"], user="user", check=False).stdout
        == "0\n"
    )
