"""The TAP pool in a network namespace: what it makes, takes back, refuses, and finds again."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from main_loop import run
from pool_tools import applied, bridged, ip, nft, pool_at, require_workers_here, taps_there, vm
from vmsilod.errors import StartFailed
from vmsilod.network import taps

if TYPE_CHECKING:
    from vmsilod.network.pool import NetworkPool, OpenPort

NOBODY = 65534


@pytest.fixture(autouse=True)
def workers_here() -> None:
    require_workers_here()


@pytest.fixture
def pool(tmp_path: Path) -> NetworkPool:
    return pool_at(tmp_path / "lent")


def close_all(opened: list[OpenPort]) -> None:
    for each in opened:
        for fd in each.tap_fds:
            os.close(fd)


def sysctl(family: str, name: str, key: str) -> str:
    return Path(f"/proc/sys/net/{family}/conf/{name}/{key}").read_text().strip()


def test_a_tap_is_up_with_its_address_and_its_rules(pool: NetworkPool) -> None:
    applied(pool, vm(1, tap={"host_address_v6": "fd00:1::1/64"}))
    shown = ip("-d", "addr", "show", "vm1-0")
    assert "inet 10.0.1.1/24" in shown
    assert "inet6 fd00:1::1/64" in shown
    assert "alias vmsilo:vm1:eth0" in shown
    assert "group 30317" in shown
    assert "link/ether fe:00:00:00:00:01" in shown
    assert ",UP" in shown
    assert "vnet_hdr off" in shown
    assert "persist on" in shown
    assert "user root" in shown
    assert "vm1-0" in nft("list", "ruleset")
    assert sysctl("ipv4", "vm1-0", "forwarding") == "1"
    assert sysctl("ipv4", "vm1-0", "rp_filter") == "1"
    assert sysctl("ipv6", "vm1-0", "accept_ra") == "0"
    assert "fd00:1::/64 dev vm1-0" in ip("-6", "route")


def test_the_host_has_no_ipv6_where_the_vm_has_none(pool: NetworkPool) -> None:
    applied(pool, vm(1))
    assert sysctl("ipv6", "vm1-0", "disable_ipv6") == "1"
    assert "inet6" not in ip("addr", "show", "vm1-0")


def test_no_other_user_can_open_a_tap(pool: NetworkPool) -> None:
    """The node is open to all; only the owner of a persistent TAP keeps others out."""
    applied(pool, vm(1), vm(2, cpus=2))
    for name, flags in (("vm1-0", 0x1002), ("vm2-0", 0x1102)):
        fd = os.open("/dev/net/tun", os.O_RDWR)
        os.seteuid(NOBODY)
        try:
            with pytest.raises(PermissionError):
                fcntl.ioctl(fd, taps.TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        finally:
            os.seteuid(0)
            os.close(fd)


@pytest.mark.parametrize("queues", [1, 4])
def test_a_start_gets_a_descriptor_for_each_queue(pool: NetworkPool, queues: int) -> None:
    applied(pool, vm(1, cpus=queues))
    opened = run(pool.open("vm1"))
    assert [len(each.tap_fds) for each in opened] == [queues]
    assert "LOWER_UP" in ip("link", "show", "vm1-0")
    os.set_blocking(opened[0].tap_fds[0], True)
    close_all(opened)
    run(pool.close("vm1"))
    again = run(pool.open("vm1"))
    assert [len(each.tap_fds) for each in again] == [queues]
    close_all(again)


@pytest.mark.parametrize("queues", [1, 2])
def test_a_tap_that_another_process_holds_starts_no_vm(pool: NetworkPool, queues: int) -> None:
    applied(pool, vm(1, cpus=queues))
    opened = run(pool.open("vm1"))
    with pytest.raises(StartFailed, match="another process has it open"):
        run(pool.open("vm1"))
    close_all(opened)


def test_an_offline_vm_gets_nothing(pool: NetworkPool) -> None:
    applied(pool, vm(1))
    assert run(pool.open("vm2")) == []


def test_before_the_first_plan_no_rule_and_no_tap_is_touched(pool: NetworkPool) -> None:
    ip("tuntap", "add", "vm1-0", "mode", "tap")
    assert run(pool.open("vm1")) == []
    assert taps_there() == {"vm1-0"}


@pytest.mark.parametrize("kind", ["tap", "tun", "dummy-like"])
def test_a_foreign_device_of_the_same_name_is_refused(pool: NetworkPool, kind: str) -> None:
    if kind == "dummy-like":
        ip("link", "add", "vm1-0", "type", "bridge")
    else:
        ip("tuntap", "add", "vm1-0", "mode", kind)
    before = ip("-d", "link", "show", "vm1-0")
    applied(pool, vm(1), vm(2))
    assert ip("-d", "link", "show", "vm1-0") == before
    with pytest.raises(StartFailed, match="already a network device 'vm1-0', and it is not vmsilo's"):
        run(pool.open("vm1"))
    close_all(run(pool.open("vm2")))  # nobody else's trouble
    run(pool.close("vm2"))
    applied(pool)
    assert taps_there() == {"vm1-0"}
    assert "vmsilo" not in nft("list", "ruleset")
    ip("link", "del", "vm1-0")
    applied(pool, vm(1))
    close_all(run(pool.open("vm1")))


def test_a_device_that_only_looks_like_ours_in_part_is_foreign(pool: NetworkPool) -> None:
    ip("tuntap", "add", "vm1-0", "mode", "tap")
    ip("link", "set", "vm1-0", "alias", "vmsilo:vm1:eth0")
    ip("tuntap", "add", "other", "mode", "tap")
    ip("link", "set", "other", "group", "30318")  # what the group delete removes
    applied(pool, vm(2))
    applied(pool)
    assert taps_there() == {"vm1-0", "other"}


def test_taps_go_with_their_configuration(pool: NetworkPool) -> None:
    applied(pool, vm(1), vm(2))
    applied(pool, vm(2))
    assert taps_there() == {"vm2-0"}
    assert "vm1-0" not in nft("list", "ruleset")
    applied(pool)
    assert taps_there() == set()
    assert nft("list", "ruleset") == ""


def test_a_running_vm_keeps_its_tap_until_it_stops(pool: NetworkPool) -> None:
    applied(pool, vm(1), vm(2))
    opened = run(pool.open("vm1"))
    index = Path("/sys/class/net/vm1-0/ifindex").read_text()
    applied(pool, vm(1, addresses=[], tap={"host_address": "10.9.9.1/24"}), vm(2))
    assert "inet 10.0.1.1/24" in ip("addr", "show", "vm1-0")
    applied(pool, vm(2))
    assert Path("/sys/class/net/vm1-0/ifindex").read_text() == index
    assert "LOWER_UP" in ip("link", "show", "vm1-0")
    assert "vm1-0" in nft("list", "ruleset")
    close_all(opened)
    run(pool.close("vm1"))
    assert taps_there() == {"vm2-0"}


def test_what_a_running_vm_has_is_nobody_elses(pool: NetworkPool) -> None:
    applied(pool, vm(1))
    opened = run(pool.open("vm1"))
    applied(pool, vm(2, tap={"name": "vm1-0"}))
    with pytest.raises(StartFailed, match="vm1 still runs with"):
        run(pool.open("vm2"))
    close_all(opened)
    run(pool.close("vm1"))
    assert "alias vmsilo:vm2:eth0" in ip("link", "show", "vm1-0")
    close_all(run(pool.open("vm2")))


def test_other_queues_or_addresses_are_taken_over_when_stopped(pool: NetworkPool) -> None:
    applied(pool, vm(1))
    applied(pool, vm(1, cpus=2, addresses=[], tap={"host_address": "10.7.7.1/24"}))
    shown = ip("-d", "addr", "show", "vm1-0")
    assert "qdisc mq" in shown
    assert "10.7.7.1/24" in shown
    assert "10.0.1.1" not in shown
    opened = run(pool.open("vm1"))
    assert len(opened[0].tap_fds) == 2
    close_all(opened)


def test_what_a_vmm_did_to_its_tap_ends_with_the_run(pool: NetworkPool) -> None:
    """By its descriptor it may change owner, persistence and address, and nobody asks it for rights."""
    applied(pool, vm(1))
    (opened,) = run(pool.open("vm1"))
    index = Path("/sys/class/net/vm1-0/ifindex").read_text()
    fcntl.ioctl(opened.tap_fds[0], taps.TUNSETOWNER, NOBODY)
    close_all([opened])
    run(pool.close("vm1"))
    assert "user root" in ip("-d", "link", "show", "vm1-0")
    assert Path("/sys/class/net/vm1-0/ifindex").read_text() != index
    (opened,) = run(pool.open("vm1"))
    fcntl.ioctl(opened.tap_fds[0], taps.TUNSETPERSIST, 0)
    close_all([opened])
    run(pool.close("vm1"))
    assert taps_there() == {"vm1-0"}
    assert "vm1-0" in nft("list", "chains", "netdev")  # the new device is hooked too
    close_all(run(pool.open("vm1")))


def test_bridged_taps_cannot_reach_each_other(pool: NetworkPool) -> None:
    ip("link", "add", "br0", "type", "bridge")
    mac = Path("/sys/class/net/br0/address").read_text()
    applied(pool, bridged(1, "br0"), bridged(2, "br0"))
    for name in ("vm1-0", "vm2-0"):
        shown = ip("-d", "link", "show", name)
        assert "master br0" in shown
        assert "isolated on" in shown
        assert sysctl("ipv4", name, "forwarding") == "0"
        assert sysctl("ipv6", name, "disable_ipv6") == "1"
    assert mac
    applied(pool, vm(1, addresses=[], tap={"host_address": None}))
    assert "master" not in ip("link", "show", "vm1-0")
    assert taps_there() == {"br0", "vm1-0"}


def test_a_bridge_that_is_not_there_stops_its_vm_alone(pool: NetworkPool) -> None:
    applied(pool, bridged(1, "br0"), vm(2))
    with pytest.raises(StartFailed, match="there is no bridge 'br0'"):
        run(pool.open("vm1"))
    assert ",UP" not in ip("link", "show", "vm1-0")
    close_all(run(pool.open("vm2")))
    ip("link", "add", "br0", "type", "bridge")
    close_all(run(pool.open("vm1")))  # it looks again
    ip("link", "set", "vm1-0", "nomaster")
    run(pool.close("vm1"))
    close_all(run(pool.open("vm1")))
    assert "master br0" in ip("link", "show", "vm1-0")


def test_without_rules_nothing_is_up_and_no_vm_starts(
    pool: NetworkPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("vmsilod.network.nft.NFT", str(tmp_path / "missing"))
        applied(pool, vm(1))
        with pytest.raises(StartFailed, match="rules cannot be installed"):
            run(pool.open("vm1"))
    assert ",UP" not in ip("link", "show", "vm1-0")
    assert sysctl("ipv4", "vm1-0", "forwarding") == "0"
    close_all(run(pool.open("vm1")))
    assert ",UP" in ip("link", "show", "vm1-0")


def test_nft_refuses_and_what_runs_goes_on_under_the_old_rules(
    pool: NetworkPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied(pool, vm(1))
    opened = run(pool.open("vm1"))
    before = nft("list", "ruleset")
    with monkeypatch.context() as patch:
        fake = tmp_path / "nft"
        fake.write_text(
            f'#!/bin/sh\ncase "$*" in *-f*) echo "no" >&2; exit 1;; esac\nexec {_which("nft")} "$@"\n'
        )
        fake.chmod(0o755)
        patch.setattr("vmsilod.network.nft.NFT", str(fake))
        applied(pool, vm(1), vm(2))
        with pytest.raises(StartFailed, match="no"):
            run(pool.open("vm2"))
    assert nft("list", "ruleset") == before
    assert ",UP" in ip("link", "show", "vm1-0")
    assert sysctl("ipv4", "vm1-0", "forwarding") == "1"
    assert ",UP" not in ip("link", "show", "vm2-0")
    close_all(opened)


def _which(program: str) -> str:
    import shutil

    found = shutil.which(program)
    assert found is not None
    return found


def test_a_start_puts_right_what_somebody_changed(pool: NetworkPool) -> None:
    applied(pool, vm(1))
    ip("addr", "flush", "dev", "vm1-0")
    ip("addr", "add", "10.66.0.1/16", "dev", "vm1-0")
    nft("flush", "ruleset")
    close_all(run(pool.open("vm1")))
    shown = ip("addr", "show", "vm1-0")
    assert "10.0.1.1/24" in shown
    assert "10.66.0.1" not in shown
    assert "vm1-0" in nft("list", "ruleset")
    ip("link", "del", "vm1-0")
    run(pool.close("vm1"))
    close_all(run(pool.open("vm1")))


def test_forwarding_of_the_nat_interface_is_lent_and_given_back(pool: NetworkPool, tmp_path: Path) -> None:
    ip("link", "add", "wan0", "type", "veth", "peer", "name", "wan1")
    assert sysctl("ipv4", "wan0", "forwarding") == "0"
    applied(pool, vm(1), nat="wan0")
    assert sysctl("ipv4", "wan0", "forwarding") == "1"
    assert sysctl("ipv4", "wan1", "forwarding") == "0"
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == "0\n"
    assert Path("/proc/sys/net/ipv6/conf/all/forwarding").read_text() == "0\n"
    again = pool_at(tmp_path / "lent")  # the next vmsilod knows what was there
    applied(again, vm(1), nat="wan0")
    applied(again, vm(1))
    assert sysctl("ipv4", "wan0", "forwarding") == "0"
    assert not (tmp_path / "lent").exists()


def test_forwarding_that_others_switched_on_since_stays(pool: NetworkPool) -> None:
    ip("link", "add", "wan0", "type", "veth", "peer", "name", "wan1")
    applied(pool, vm(1), nat="wan0")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    try:
        applied(pool)
        assert sysctl("ipv4", "wan0", "forwarding") == "1"
    finally:
        Path("/proc/sys/net/ipv4/ip_forward").write_text("0")


def test_a_new_tap_forwards_nothing_before_its_rules_whatever_the_default(
    pool: NetworkPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("/proc/sys/net/ipv4/conf/default/forwarding").write_text("1")
    try:
        with monkeypatch.context() as patch:
            patch.setattr("vmsilod.network.nft.NFT", str(tmp_path / "missing"))
            applied(pool, vm(1))
        assert sysctl("ipv4", "vm1-0", "forwarding") == "0"
    finally:
        Path("/proc/sys/net/ipv4/conf/default/forwarding").write_text("0")


def test_a_restarted_daemon_keeps_what_runs(pool: NetworkPool, tmp_path: Path) -> None:
    applied(pool, vm(1), vm(2))
    opened = run(pool.open("vm1"))
    index = Path("/sys/class/net/vm1-0/ifindex").read_text()
    rules = nft("-a", "list", "ruleset")
    again = pool_at(tmp_path / "lent")
    run(again.repair({"vm1": vm(1)}))
    applied(again, vm(1), vm(2))
    assert nft("-a", "list", "ruleset") == rules  # the same handles: nothing was installed anew
    assert Path("/sys/class/net/vm1-0/ifindex").read_text() == index
    applied(again)
    assert taps_there() == {"vm1-0"}
    close_all(opened)
    run(again.close("vm1"))
    assert taps_there() == set()


def test_a_running_vm_of_which_nothing_is_known_keeps_its_tap_down(
    pool: NetworkPool, tmp_path: Path
) -> None:
    applied(pool, vm(1))
    opened = run(pool.open("vm1"))
    again = pool_at(tmp_path / "lent")
    run(again.repair({"vm1": None}))
    applied(again)
    assert taps_there() == {"vm1-0"}
    assert ",UP" not in ip("link", "show", "vm1-0")
    close_all(opened)
    run(again.close("vm1"))
    assert taps_there() == set()


def test_views_count_what_passes(pool: NetworkPool) -> None:
    applied(pool, vm(1))
    (view,) = run(pool.find_views("vm1"))
    assert (view.interface, view.tap, view.state, view.problem) == ("eth0", "vm1-0", "idle", "")
    (opened,) = run(pool.open("vm1"))
    frame = bytes.fromhex("ffffffffffff0200000000010806") + bytes(46)
    before = run(pool.find_views("vm1"))[0]
    os.write(opened.tap_fds[0], frame)
    after = run(pool.find_views("vm1"))[0]
    assert after.state == "up"
    assert after.sent - before.sent == len(frame)
    assert after.dropped == {"arp": 1}
    for _ in range(2):
        os.write(opened.tap_fds[0], frame[:6] + bytes.fromhex("0200000000ff") + frame[12:])
    told = run(pool.find_views("vm1"))[0]
    assert (told.kind, told.network, told.dropped, told.denied) == ("tap", "", {"arp": 1, "mac": 2}, 0)
    close_all([opened])
    ip("link", "set", "vm1-0", "down")
    assert run(pool.find_views("vm1"))[0].problem == "the TAP 'vm1-0' is down"
