"""Networks on a whole host with stand-in VMs: TAPs follow the configuration, and nothing starts unruled."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hosts.standin.site import Site

ONLINE = """\
{more}
[network.interfaces.wan]
tap.host_address = "10.77.{number}.1/24"
addresses = ["10.77.{number}.2/24"]
routes = {{ "0.0.0.0/0" = {{ via = "10.77.{number}.1" }} }}
"""


@pytest.fixture(autouse=True)
def tun_node(site: Site) -> None:
    if site.host.run("test -c /dev/net/tun", check=False).returncode:
        pytest.skip("no /dev/net/tun in the container")


def online(site: Site, number: int, more: str = "") -> str:
    return site.define(ONLINE.format(number=number, more=more))


def link(site: Site, tap: str) -> dict[str, Any]:
    done = site.host.run(["ip", "-j", "-d", "addr", "show", "dev", tap], check=False)
    return dict(json.loads(done.stdout)[0]) if done.returncode == 0 else {}


def rules(site: Site) -> str:
    return site.host.run(["nft", "list", "ruleset"]).stdout


def test_a_tap_is_there_before_its_vm_runs_and_gone_with_its_file(site: Site) -> None:
    name = online(site, 1)
    shown = link(site, f"{name}-0")
    assert "UP" in shown["flags"]
    assert shown["ifalias"] == f"vmsilo:{name}:wan"
    assert [entry["local"] for entry in shown["addr_info"]] == ["10.77.1.1"]
    assert f'"{name}-0"' in rules(site)
    assert site.host.run(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout == "0\n"
    site.host.run(["rm", f"/etc/vmsilo/vms.d/{name}.toml"])
    site.host.wait_until(f"! test -e /sys/class/net/{name}-0", seconds=20)
    site.host.wait_until("! nft list tables | grep -q vmsilo", seconds=20)


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_vm_starts_with_its_interface(site: Site, cpus: int) -> None:
    name = online(site, 1, f"cpus = {cpus}")
    assert site.vm_run(name, "true").returncode == 0
    assert "LOWER_UP" in link(site, f"{name}-0")["flags"]
    argv = site.host.run(f"tr '\\0' ' ' < /proc/{site.main_pid(name)}/cmdline")
    assert "-netdev tap,id=net-wan,fds=" in argv.stdout
    assert "vmsilo.ifname=wan," in argv.stdout
    fds = site.host.run(f"ls -l /proc/{site.main_pid(name)}/fd").stdout
    assert fds.count("/dev/net/tun") == cpus
    shown = site.host.run(["vmsilo", "status", name]).stdout
    assert f"network wan ({name}-0): up, " in shown
    told = json.loads(site.host.run(["vmsilo", "status", "--json", name]).stdout)
    assert [(port["Interface"], port["State"]) for port in told["Network"]] == [("wan", "up")]
    site.host.run(["vm-stop", name])
    assert "LOWER_UP" not in link(site, f"{name}-0")["flags"]
    assert site.vm_run(name, "true").returncode == 0


def test_vmsilod_is_killed_and_the_next_one_goes_on(site: Site) -> None:
    name, other = online(site, 1), online(site, 2)
    assert site.vm_run(name, "true").returncode == 0
    before = link(site, f"{name}-0")["ifindex"], link(site, f"{other}-0")["ifindex"]
    ruled = rules(site)
    site.host.kill_main("vmsilod.service")
    site.host.wait_until("systemctl -q is-active vmsilod.service", seconds=20)
    assert rules(site) == ruled
    assert (link(site, f"{name}-0")["ifindex"], link(site, f"{other}-0")["ifindex"]) == before
    assert "LOWER_UP" in link(site, f"{name}-0")["flags"]
    assert site.vm_run(other, "true").returncode == 0
    site.host.run(["rm", f"/etc/vmsilo/vms.d/{name}.toml"])
    site.host.run("busctl call org.vmsilo1 /org/vmsilo1 org.vmsilo1.Manager Reload")
    assert "LOWER_UP" in link(site, f"{name}-0")["flags"]  # as long as it runs
    site.host.run(["vm-stop", name])
    site.host.wait_until(f"! test -e /sys/class/net/{name}-0", seconds=20)


def test_without_its_rules_a_vm_does_not_start(site: Site) -> None:
    site.expect(
        "rules cannot be installed|is not in place|Failed to start|failed with result|is down|failed"
    )
    site.host.run("mount --bind /bin/false /usr/sbin/nft")
    try:
        name = online(site, 1)
        assert "UP" not in link(site, f"{name}-0")["flags"]
        done = site.vm_run(name, "true")
        assert done.returncode == 125
        assert "its rules cannot be installed" in done.stderr
        offline = site.define()
        assert site.vm_run(offline, "true").returncode == 0
    finally:
        site.host.run("umount /usr/sbin/nft")
    assert site.vm_run(name, "true").returncode == 0
    assert "UP" in link(site, f"{name}-0")["flags"]


def test_a_ruleset_that_somebody_flushed_is_there_again(site: Site) -> None:
    site.expect("somebody removed or changed")
    name = online(site, 1)
    assert site.vm_run(name, "true").returncode == 0
    ruled = rules(site)
    site.host.run(["nft", "flush", "ruleset"])
    site.host.wait_until(f"nft list ruleset | grep -q {name}-0", seconds=20)
    assert rules(site) == ruled
    site.host.wait_until(f"grep -q 1 /proc/sys/net/ipv4/conf/{name}-0/forwarding", seconds=20)


def test_a_device_of_somebody_else_is_not_taken_over(site: Site) -> None:
    site.expect("already a network device|is not in place|Failed to start|failed with result|failed")
    site.host.run("ip tuntap add dev mine mode tap")
    try:
        name = site.define(
            '[network.interfaces.wan]\ntap.name = "mine"\ntap.host_address = "10.77.3.1/24"\n'
        )
        done = site.vm_run(name, "true")
        assert done.returncode == 125
        assert "already a network device 'mine'" in done.stderr
        assert "UP" not in link(site, "mine")["flags"]
        assert "ifalias" not in link(site, "mine")
    finally:
        site.host.run("ip link del mine")
    assert site.vm_run(name, "true").returncode == 0


def test_a_vm_whose_bridge_comes_later_starts_when_it_is_there(site: Site) -> None:
    """As at the host's boot, where the network may be made after vmsilod; but nobody owes it a start now."""
    site.expect("no network interface 'late0'|there is no bridge 'late0'")
    text = 'auto_start = true\n[network.interfaces.wan]\ntap.bridge = "late0"\n'
    name = site.define(text, wait=False)
    site.wait_for_state(name, "broken")
    site.host.run("ip link add late0 type bridge")
    try:
        site.wait_for_state(name, "stopped")
        assert site.vm_run(name, "true").returncode == 0
        assert link(site, f"{name}-0")["master"] == "late0"
        site.host.run(["vm-stop", name], user="user")
    finally:
        site.host.run("ip link delete late0")
