"""The TAP pool with as many VMs as anybody has, and with somebody who changes things behind its back."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from main_loop import run
from pool_tools import applied, bridged, ip, nft, pool_at, require_workers_here, taps_there, vm
from vmsilod import loop
from vmsilod.network.links import Links
from vmsilod.network.watch import NetworkWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmsilod.network.pool import NetworkPool

MANY = 500


@pytest.fixture(autouse=True)
def workers_here() -> None:
    require_workers_here()


@pytest.fixture
def pool(tmp_path: Path) -> NetworkPool:
    return pool_at(tmp_path / "lent")


@pytest.fixture
def watched(pool: NetworkPool) -> Iterator[NetworkPool]:
    watch = NetworkWatch(pool.rules_touched, pool.links_touched)
    yield pool
    watch.close()
    applied(pool)  # whatever it had begun is done


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether it comes true while the loop runs."""

    async def wait() -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            await loop.after(0.02)
        return True

    return run(wait())


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough


def test_five_hundred_taps_come_and_go_in_batches(pool: NetworkPool) -> None:
    applied(pool, vm(1))
    before = fds()
    vms = [vm(number) for number in range(1, MANY + 1)]
    applied(pool, *vms)
    names = {f"vm{number}-0" for number in range(1, MANY + 1)}
    assert taps_there() == names
    shown = ip("-o", "addr")
    assert all(f"{config.network.interfaces['eth0'].tap.host_address} " in shown for config in vms)
    assert ip("-o", "link", "show", "up", "group", "30317").count("\n") == MANY
    hooked = re.findall(r"vm\d+-0", nft("list", "ruleset"))
    assert names <= set(hooked)
    applied(pool, *vms[:250])
    assert taps_there() == {f"vm{number}-0" for number in range(1, 251)}
    applied(pool)
    assert taps_there() == set()
    assert nft("list", "ruleset") == ""
    assert fds() == before


def test_a_flushed_ruleset_is_there_again_at_once(watched: NetworkPool) -> None:
    applied(watched, vm(1))
    rules = nft("list", "ruleset")
    nft("flush", "ruleset")
    assert until(lambda: nft("list", "ruleset") == rules)
    assert until(lambda: Path("/proc/sys/net/ipv4/conf/vm1-0/forwarding").read_text() == "1\n")
    nft("delete", "table", "netdev", "vmsilo")
    assert until(lambda: nft("list", "ruleset") == rules)


@pytest.mark.parametrize(
    "command",
    [
        "flush chain inet vmsilo to_host",
        "flush chain netdev vmsilo check_ip4",
        "insert rule inet vmsilo from_vm accept",
    ],
)
def test_a_chain_that_somebody_changed_is_there_again_at_once(watched: NetworkPool, command: str) -> None:
    applied(watched, vm(1))
    rules = nft("list", "ruleset")
    nft(*command.split())
    assert nft("list", "ruleset") != rules
    assert until(lambda: nft("list", "ruleset") == rules)


def test_other_peoples_tables_stay_as_they_are(watched: NetworkPool) -> None:
    nft("add table inet theirs { chain c { type filter hook forward priority 0; policy accept; }; }")
    applied(watched, vm(1))
    theirs = nft("list", "table", "inet", "theirs")
    applied(watched, vm(2))
    nft("delete", "table", "inet", "vmsilo")
    assert until(lambda: "table inet vmsilo" in nft("list", "tables"))
    assert nft("list", "table", "inet", "theirs") == theirs
    applied(watched)
    assert nft("list", "tables") == "table inet theirs\n"


def test_a_tap_that_somebody_removed_or_took_down_is_there_again(watched: NetworkPool) -> None:
    applied(watched, vm(1))
    ip("link", "del", "vm1-0")
    assert until(lambda: "vm1-0" in taps_there() and ",UP" in ip("link", "show", "vm1-0"))
    ip("link", "set", "vm1-0", "down")
    assert until(lambda: ",UP" in ip("link", "show", "vm1-0"))


def test_the_address_that_udev_gives_a_new_tap_does_not_stay(
    pool: NetworkPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no udev in this namespace; here it comes right after vmsilo, as it may, once for each."""
    mark, seen = Links.mark, set[int]()

    def mark_before_udev(links: Links, index: int, *, alias: str, mac: str) -> None:
        mark(links, index, alias=alias, mac=mac)
        if index not in seen:
            seen.add(index)
            ip("link", "set", "dev", socket.if_indextoname(index), "address", "02:11:22:33:44:55")

    monkeypatch.setattr(Links, "mark", mark_before_udev)
    applied(pool, vm(1), vm(2))
    assert len(seen) == 2
    for number in (1, 2):
        assert f"link/ether fe:00:00:00:00:0{number} " in ip("link", "show", f"vm{number}-0")
        assert ",UP" in ip("link", "show", f"vm{number}-0")
    assert not caplog.records


def test_a_bridge_and_a_nat_interface_may_come_late(watched: NetworkPool) -> None:
    applied(watched, bridged(1, "br0"), vm(2), nat="wan0")
    assert ",UP" not in ip("link", "show", "vm1-0")
    ip("link", "add", "br0", "type", "bridge")
    assert until(lambda: "master br0" in ip("link", "show", "vm1-0"))
    ip("link", "add", "wan0", "type", "veth", "peer", "name", "wan1")
    assert until(lambda: Path("/proc/sys/net/ipv4/conf/wan0/forwarding").read_text() == "1\n")


def test_a_vmm_that_changes_the_address_of_its_end_is_cut_off(watched: NetworkPool) -> None:
    """On a bridge it would be another's address, for all who are on that bridge."""
    ip("link", "add", "br0", "type", "bridge")
    applied(watched, bridged(1, "br0"))
    (opened,) = run(watched.open("vm1"))
    ip("link", "set", "vm1-0", "address", "02:11:22:33:44:55")
    assert until(lambda: ",UP" not in ip("link", "show", "vm1-0"))
    for fd in opened.tap_fds:
        os.close(fd)
    run(watched.close("vm1"))
    assert ",UP" in ip("link", "show", "vm1-0")
    assert "link/ether fe:00:00:00:00:01" in ip("link", "show", "vm1-0")


def test_the_rules_follow_the_networks_that_the_host_is_in(watched: NetworkPool) -> None:
    """What the host is in is no internet, whatever its addresses."""
    applied(watched, vm(1), nat="wan0")
    assert "203.0.113.0/24" not in nft("list", "ruleset")
    ip("link", "add", "wan0", "type", "veth", "peer", "name", "wan1")
    ip("addr", "add", "203.0.113.7/24", "dev", "wan0")
    assert until(lambda: "203.0.113.0/24" in nft("list", "ruleset"))
