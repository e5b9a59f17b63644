"""Interfaces of a real guest that come and go while it runs: names, addresses and routes in it, packets
through NAT, and nothing left when they are gone.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from e2e.internet import INTERNET, WAN, addresses_of, ask, define, in_guest, internet, remove, shown_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.container import Container

GUEST_SECONDS = 30
# Without a route: what it reaches, it reaches by what is attached.
VM = """\
memory = 768
cpus = 1
vmm = "qemu"
qemu.machine = "q35"
[network.interfaces.office]
tap.host_address = "10.77.2.1/24"
addresses = ["10.77.2.2/24"]
"""
LAN = """\
[network.interfaces.lan]
tap.host_address = "10.77.3.1/24"
addresses = ["10.77.3.2/24"]
routes = { "0.0.0.0/0" = { via = "10.77.3.1" } }
"""


@pytest.fixture(scope="module")
def plug(host: Container) -> Iterator[Container]:
    """The VM `plug`, which was started with `office` and has `lan` in its file by now."""
    with internet(host):
        define(host, "plug", VM)
        try:
            host.run(["vm-start", "plug", "--wait"], user="user")
            assert ask(host, "plug", INTERNET) == "closed"
            host.write("/etc/vmsilo/vms.d/plug.toml", VM + LAN)
            host.wait_until("vmsilo network list plug | grep -q ^lan.*detached", seconds=20)
            yield host
        finally:
            remove(host, "plug")


def attach(host: Container, interface: str = "lan") -> None:
    host.run(["vmsilo", "network", "attach", "plug", interface])


def detach(host: Container, interface: str = "lan") -> None:
    host.run(["vmsilo", "network", "detach", "plug", interface])


def wait_for_guest(host: Container, addresses: dict[str, set[str]]) -> None:
    """Until its interfaces are these."""
    deadline = time.monotonic() + GUEST_SECONDS
    wanted = {"lo": {"127.0.0.1/8", "::1/128"}} | addresses
    while (found := addresses_of(host, "plug")) != wanted:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)


OFFICE = {"office": {"10.77.2.2/24"}}
BOTH = OFFICE | {"lan": {"10.77.3.2/24"}}


def test_an_interface_comes_as_it_is_configured_and_goes(plug: Container) -> None:
    attach(plug)
    wait_for_guest(plug, BOTH)
    assert in_guest(plug, "plug", "ip route show default").split()[:5] == [
        *("default", "via", "10.77.3.1", "dev", "lan")
    ]
    assert ask(plug, "plug", INTERNET) == WAN
    assert ask(plug, "plug", "10.77.3.1") == "closed"  # this host
    before = shown_of(plug, "plug")["lan"]
    assert (before["State"], before["Tap"]) == ("up", "plug-1")
    assert before["Received"] > 0
    assert ask(plug, "plug", INTERNET) == WAN
    after = shown_of(plug, "plug")["lan"]
    assert after["Received"] > before["Received"]
    assert after["Sent"] > before["Sent"]
    assert after["Denied"] > 0
    assert after["Dropped"] == {}, "an honest guest says nothing false"
    assert plug.vms()["plug"]["RestartNeeded"] is False

    detach(plug)
    assert addresses_of(plug, "plug").keys() == {"lo", "office"}
    assert ask(plug, "plug", INTERNET) == "closed"
    plug.run("! test -e /sys/class/net/plug-1")
    assert "plug-1" not in plug.run("nft list ruleset").stdout
    assert shown_of(plug, "plug")["lan"]["State"] == "detached"
    assert plug.vms()["plug"]["RestartNeeded"] is True


def test_it_comes_again_and_lives_through_a_crash_of_vmsilod(plug: Container) -> None:
    attach(plug)
    wait_for_guest(plug, BOTH)
    kill_vmsilod(plug)
    assert ask(plug, "plug", INTERNET) == WAN
    wait_for_vmsilod(plug)
    assert shown_of(plug, "plug")["lan"]["State"] == "up"
    assert ask(plug, "plug", INTERNET) == WAN
    detach(plug)
    assert addresses_of(plug, "plug").keys() == {"lo", "office"}
    attach(plug)
    wait_for_guest(plug, BOTH)
    assert ask(plug, "plug", INTERNET) == WAN


def test_one_that_it_was_started_with_goes_and_comes(plug: Container) -> None:
    detach(plug, "office")
    assert "office" not in addresses_of(plug, "plug")
    assert ask(plug, "plug", INTERNET) == WAN, "the other is not disturbed"
    attach(plug, "office")
    wait_for_guest(plug, BOTH)
    assert ask(plug, "plug", INTERNET) == WAN


def test_a_crash_of_vmsilod_amid_an_attachment_is_cured_by_a_detachment(plug: Container) -> None:
    """What it had begun is in the VM's record: the interface may be there or not."""
    if shown_of(plug, "plug")["lan"]["State"] != "detached":
        detach(plug)
    order = plug.popen(["vmsilo", "network", "attach", "plug", "lan"], stdout=-3, stderr=-3)
    plug.wait_until("test -e /sys/class/net/plug-1", seconds=20)
    kill_vmsilod(plug)
    assert order.wait() != 0
    wait_for_vmsilod(plug)
    if shown_of(plug, "plug")["lan"]["State"] != "detached":
        detach(plug)
    assert shown_of(plug, "plug")["lan"]["State"] == "detached"
    attach(plug)
    wait_for_guest(plug, BOTH)
    assert ask(plug, "plug", INTERNET) == WAN


def kill_vmsilod(host: Container) -> None:
    host.kill_main("vmsilod.service")


def wait_for_vmsilod(host: Container) -> None:
    host.wait_until("vmsilo status plug", seconds=30)
