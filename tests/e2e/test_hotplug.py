"""An interface of a real guest comes and goes while it runs: QEMU's machine q35."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.container import Container

FILE = "/etc/vmsilo/vms.d/plug.toml"
WAN = """\
memory = 768
vmm = "qemu"
[qemu]
machine = "q35"
[network.interfaces.wan]
tap.host_address = "10.90.0.1/24"
addresses = ["10.90.0.2/24"]
"""
LAN = """\
[network.interfaces.lan]
tap.host_address = "10.91.0.1/24"
addresses = ["10.91.0.2/24"]
"""
RELOAD = "busctl call org.vmsilo1 /org/vmsilo1 org.vmsilo1.Manager Reload"


@pytest.fixture
def plug(host: Container) -> Iterator[Container]:
    """The VM plug, which runs with `wan` and whose file has `lan` too by now."""
    if host.run("test -c /dev/net/tun", check=False).returncode:
        pytest.skip("no /dev/net/tun in the container")
    host.write(FILE, WAN)
    host.run(RELOAD)
    host.run(["vm-start", "plug", "--wait"], user="user")
    host.write(FILE, WAN + LAN)
    host.run(RELOAD)
    yield host
    host.run("vm-stop --force plug", check=False)
    host.run(["rm", FILE])
    host.wait_until("! ip link | grep -q plug-", seconds=20)


def addresses(host: Container) -> dict[str, list[str]]:
    shown = host.run(["vm-run", "plug", "ip", "-j", "address"], user="user").stdout
    return {link["ifname"]: [each["local"] for each in link["addr_info"]] for link in json.loads(shown)}


def states(host: Container) -> dict[str, str]:
    listed = host.run(["vmsilo", "network", "list", "--json", "plug"], user="user").stdout
    return {port["Interface"]: port["State"] for port in json.loads(listed)}


def answers(host: Container, address: str) -> bool:
    asked = f"for i in 1 2 3 4 5 6 7 8 9 10; do ping -c1 -W1 {address} && exit 0; sleep 0.5; done; exit 1"
    return host.run(asked, check=False).returncode == 0


def test_an_interface_comes_goes_and_comes_back(plug: Container) -> None:
    assert states(plug) == {"wan": "up", "lan": "detached"}
    assert plug.vms()["plug"]["RestartNeeded"]
    for _ in range(2):
        plug.run(["vmsilo", "network", "attach", "plug", "lan"], user="user")
        assert answers(plug, "10.91.0.2")
        assert addresses(plug) == {"lo": ["127.0.0.1", "::1"], "wan": ["10.90.0.2"], "lan": ["10.91.0.2"]}
        assert states(plug) == {"wan": "up", "lan": "up"}
        assert not plug.vms()["plug"]["RestartNeeded"]
        plug.run(["vmsilo", "network", "detach", "plug", "lan"], user="user")
        assert addresses(plug).keys() == {"lo", "wan"}
        assert not plug.run("ip link show plug-1", check=False).stdout
    # One that it was started with, too, and what vmsilod gave holds after vmsilod has been killed.
    plug.run(["vmsilo", "network", "detach", "plug", "wan"], user="user")
    plug.run(["vmsilo", "network", "attach", "plug", "wan"], user="user")
    plug.run(["vmsilo", "network", "attach", "plug", "lan"], user="user")
    plug.run("systemctl kill -s KILL vmsilod")
    plug.wait_until("vmsilo list", seconds=30)
    assert states(plug) == {"wan": "up", "lan": "up"}
    assert answers(plug, "10.90.0.2")
    assert answers(plug, "10.91.0.2")
    refused = plug.run(["vmsilo", "network", "attach", "plug", "lan"], user="user", check=False)
    assert "already" in refused.stderr
