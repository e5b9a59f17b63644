"""A real guest behind a TAP: out through NAT, and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from e2e.internet import INTERNET, ROUTER, WAN, ask, define, internet, remove

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.container import Container

VM = """\
memory = 768
cpus = 2
[network.interfaces.wan]
tap.host_address = "10.77.1.1/24"
addresses = ["10.77.1.2/24"]
routes = { "0.0.0.0/0" = { via = "10.77.1.1" } }
"""


@pytest.fixture(scope="module")
def online(host: Container) -> Iterator[Container]:
    """The VM `online`, not started yet."""
    with internet(host):
        define(host, "online", VM)
        yield host
        remove(host, "online")


def test_the_internet_is_reached_through_nat_alone(online: Container) -> None:
    assert ask(online, "online", INTERNET) == WAN
    assert ask(online, "online", "10.77.1.1") == "closed"  # this host
    assert ask(online, "online", WAN) == "closed"
    assert ask(online, "online", ROUTER) == "closed"  # a neighbour of this host
    assert online.run(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout == "0\n"
    shown = online.run(["vmsilo", "status", "online"]).stdout
    assert "network wan (online-0): up, " in shown
    assert "packets denied" in shown


def test_what_is_allowed_is_open_at_once(online: Container) -> None:
    online.write("/etc/vmsilo/vms.d/online.toml", 'network.allow = ["203.0.113.2:8080/tcp"]\n' + VM)
    online.wait_until("nft list ruleset | grep -q 203.0.113.2", seconds=20)
    assert ask(online, "online", ROUTER) == WAN
    assert ask(online, "online", "10.77.1.1") == "closed"


def test_a_vm_without_interfaces_has_only_its_own_loopback(online: Container) -> None:
    links = online.run(["vm-run", "other", "ls", "/sys/class/net"], user="user").stdout.split()
    assert [name for name in links if name != "lo"] == []
    assert ask(online, "other", INTERNET) == "closed"


def test_the_guest_goes_on_through_a_crash_of_vmsilod(online: Container) -> None:
    online.kill_main("vmsilod.service")
    assert ask(online, "online", INTERNET) == WAN
    online.wait_until("systemctl -q is-active vmsilod.service", seconds=20)
    assert ask(online, "online", INTERNET) == WAN
