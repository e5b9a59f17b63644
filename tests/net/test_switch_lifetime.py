"""VM-to-VM networks over their life: made, changed, adopted by another vmsilod, torn down by somebody else
and made again, removed when nobody is on them.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from main_loop import run
from net.networks import LAN, Desk, gateway_of, make_port, make_router
from vmsilod.errors import StartFailed
from vmsilod.network.plan import NetworkPlan
from vmsilod.network.switch import Switches

A, B, C = make_port("alpha", 2), make_port("beta", 3), make_port("gamma", 4)


def test_a_network_goes_when_no_vm_is_configured_on_it() -> None:
    other = make_port("alien", 3, network="other")
    with Desk(A, other) as desk:
        process = desk.holders.processes["other"]
        desk.apply(A)
        assert set(desk.holders.processes) == {LAN}
        assert process.poll() is not None
        desk.apply()
        assert not desk.holders.processes


def test_a_network_stays_while_a_vm_is_still_on_it_and_then_passes_nothing() -> None:
    with Desk(A, B) as desk:
        alpha, beta = desk.plug(A), desk.plug(B)
        desk.apply(A)
        alpha.udp("10.1.0.3", b"to nobody")
        beta.udp("10.1.0.2", b"from nobody")
        assert not [frame for frame in alpha.drain() + beta.drain() if frame.payload]
        os.close(alpha.fd)
        desk.apply()
        assert set(desk.holders.processes) == {LAN}  # beta's TAP is open
        os.close(beta.fd)
        desk.apply()
        assert not desk.holders.processes


def test_a_change_reaches_running_vms() -> None:
    with Desk(A, B) as desk:
        alpha, beta = desk.plug(A), desk.plug(B)
        assert alpha.resolve("10.1.0.4") is None
        desk.apply(A, B, C)
        gamma = desk.plug(C)
        assert alpha.resolve("10.1.0.4") == gateway_of(A)
        for version in (4, 6):
            alpha.udp(gamma.address(version), b"hello")
            assert gamma.find(b"hello")
        desk.apply(make_router("alpha", 2, "192.168.9.0/24"), replace(B, receive_broadcast=True))
        beta.udp("192.168.9.1", b"through alpha")
        assert alpha.find(b"through alpha")
        assert alpha.resolve("10.1.0.4") is None
        assert desk.inside("ip", "-6", "neigh", "show", "proxy").count("fd00:1::4") == 0


def _numbers(desk: Desk) -> list[list[str]]:
    """Of the devices, with their names."""
    return [line.split()[:2] for line in desk.inside("ip", "-o", "link").splitlines()]


def test_another_vmsilod_goes_on_with_what_it_finds() -> None:
    with Desk(A, B) as desk:
        alpha = desk.plug(A)
        before = _numbers(desk), desk.inside("nft", "list", "ruleset")
        desk.switches = Switches(desk.holders)  # the last one was killed
        desk.apply(A, B)
        # Not even the rules were loaded again: their counters would be new.
        assert (_numbers(desk), desk.inside("nft", "list", "ruleset")) == before
        beta = desk.plug(B)
        alpha.udp("10.1.0.3", b"hello")
        assert beta.find(b"hello")


@pytest.mark.parametrize(
    "damage",
    [
        ["nft", "flush", "ruleset"],
        ["nft", "delete", "table", "netdev", "vmsilo"],
        ["ip", "link", "del", "beta-0"],
        ["ip", "link", "set", "beta-0", "down"],
        ["ip", "route", "flush", "table", "main"],
        ["ip", "neigh", "flush", "all", "nud", "permanent"],
        ["ip", "-6", "neigh", "del", "proxy", "fd00:1::3", "dev", "alpha-0"],
        ["sh", "-c", "echo 0 > /proc/sys/net/ipv4/conf/all/forwarding"],
        ["ip", "link", "set", "beta-0", "address", "02:00:00:00:00:09"],
        ["ip", "link", "set", "beta-0", "alias", "mine"],
    ],
    ids=lambda damage: " ".join(damage[1:])[:40],
)
@pytest.mark.parametrize("again", ["repair", "open"])
def test_what_somebody_broke_is_made_again(damage: list[str], again: str) -> None:
    with Desk(A, B) as desk:
        alpha = desk.plug(A)
        desk.inside(*damage)
        if again == "repair":
            run(desk.switches.repair())
            assert not desk.switches.faults
        beta = desk.plug(B)
        for version in (4, 6):
            alpha.udp(beta.address(version), b"hello")
            assert beta.find(b"hello")
        beta.udp("10.1.0.2", b"a lie", source="10.1.0.99")
        assert not [frame for frame in alpha.drain() if frame.payload]


def test_a_network_whose_namespace_was_lost_is_made_again() -> None:
    with Desk(A, B) as desk:
        old = [desk.plug(A), desk.plug(B)]
        run(desk.holders.release(frozenset({LAN})))
        new = [desk.plug(A), desk.plug(B)]
        # Those that ran are by themselves until they are started again.
        for alpha, beta in (old, new):
            alpha.udp("10.1.0.3", b"hello")
            assert beta.find(b"hello")
            assert not [frame for guest in (*old, *new) for frame in guest.drain() if frame.payload]


def test_a_vm_whose_rules_cannot_be_installed_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with Desk(A, B) as desk:
        alpha, beta = desk.plug(A), desk.plug(B)
        desk.inside("nft", "flush", "ruleset")
        monkeypatch.setattr("vmsilod.network.switch_batch.NFT_PATH", "/nonexistent")
        with pytest.raises(StartFailed, match="cannot run nft"):
            run(desk.switches.open(B))
        # Nor do those that run reach each other without them.
        alpha.udp("10.1.0.3", b"without rules")
        assert not [frame for frame in beta.drain() if frame.payload]
        monkeypatch.undo()
        run(desk.switches.repair())
        alpha.udp("10.1.0.3", b"with rules")
        assert beta.find(b"with rules")


def test_ports_with_several_queues_are_opened_with_all_of_them() -> None:
    wide = replace(A, queues=2)
    with Desk(wide, B) as desk:
        fds = run(desk.switches.open(wide))
        assert len(fds) == 2
        for fd in fds:
            os.close(fd)
        desk.apply(A, B)  # and made anew when there is to be one only
        assert desk.plug(A).resolve("10.1.0.3") == gateway_of(A)


def test_without_ipv6_addresses_a_network_has_no_ipv6() -> None:
    ports = [replace(port, addresses=port.addresses[:1]) for port in (A, B)]
    with Desk(*ports) as desk:
        desk.plug(ports[0])
        assert not desk.inside("ip", "-6", "-o", "addr")
        desk.apply(A, B)
        assert "alpha-0" in desk.inside("ip", "-6", "-o", "addr")


def test_every_port_queues_fairly_where_the_kernel_can() -> None:
    with Desk(A, B) as desk:
        try:
            desk.inside("tc", "qdisc", "add", "dev", "lo", "root", "fq_codel")
        except OSError:
            pytest.skip("tc is not in PATH")
        except Exception:
            pytest.skip("this kernel has no fq_codel")
        shown = desk.inside("tc", "qdisc", "show")
        assert shown.count("qdisc fq_codel 1: dev alpha-0 root") == 1
        assert shown.count("qdisc fq_codel 1: dev beta-0 root") == 1


def test_a_hundred_ports_are_one_batch() -> None:
    ports = [make_port(f"vm{number}", number) for number in range(2, 102)]
    with Desk(*ports) as desk:
        first, last = desk.plug(ports[0]), desk.plug(ports[-1])
        for version in (4, 6):
            first.udp(last.address(version), b"hello")
            assert last.find(b"hello")
        run(desk.switches.apply(NetworkPlan(tuple(ports[:1]))))
        listed = desk.inside("ip", "-o", "link")
        assert listed.count("vm2-0") == 1
        assert "vm100-0" not in listed
