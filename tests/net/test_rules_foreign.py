"""Beside the rulesets of others, loaded before ours and after: theirs stay as they are, ours hold."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from net import packets
from net.foreign import ALL, CURES
from net.rules_world import INTERNET, INTERNET6, LAN, WAN, A, B, World
from net.tap_ground import SHORT, WAIT, ip, peer, received, run
from vmsilod.errors import Failed
from vmsilod.network import nft
from vmsilod.network.ruleset import render_ruleset

if TYPE_CHECKING:
    from collections.abc import Iterator

PORT = 7000
ORDERS = pytest.mark.parametrize("order", ["before", "after"])
FOREIGN = pytest.mark.parametrize("name", ALL)
OBSTACLES = {
    "docker": ("ip filter FORWARD",),
    "firewalld": ("inet firewalld filter_FORWARD",),
    "ufw": ("ip filter FORWARD", "ip6 filter FORWARD"),
    "open": (),
}


def load(text: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)


def foreign_tables() -> str:
    """Everything that is not ours, with handles, without counters."""
    listed = run("nft", "list", "tables").splitlines()
    return "".join(
        run("nft", "-a", "-s", "list", *line.split())
        for line in listed
        if line.split()[2] not in {"vmsilo", "probe"}
    )


@pytest.fixture
def world() -> Iterator[World]:
    with World(A, B) as made:
        yield made


def load_beside(world: World, name: str, order: str) -> None:
    """The other's ruleset and ours, in this order."""
    if order == "before":
        nft.remove()
    load(ALL[name])
    if order == "before":
        world.install()


@ORDERS
@FOREIGN
def test_anothers_ruleset_is_not_touched(world: World, name: str, order: str) -> None:
    load_beside(world, name, order)
    before = foreign_tables()
    assert before
    world.install()
    world.change(replace(A, nameservers=("192.0.2.1",)))
    assert nft.is_installed(render_ruleset(world.plan, nft.look_around(world.plan)))
    assert foreign_tables() == before
    nft.remove()
    assert foreign_tables() == before
    assert not nft.has_rules()


@ORDERS
@FOREIGN
def test_what_we_deny_nobody_elses_accept_opens(world: World, name: str, order: str) -> None:
    load_beside(world, name, order)
    load(CURES[name])
    lan = world.lan()
    with lan.udp_socket(PORT) as server:
        world.say(A, LAN, PORT)
        world.say(A, "10.0.2.1", PORT)
        assert received(server, SHORT) is None
    assert world.taps["b-0"].receive(b"hello", SHORT) is None
    assert world.kinds("a-0") == {"denied": 2}
    world.say(A, "10.0.1.254", PORT)
    assert world.kinds("a-0") == {"denied": 3}


@ORDERS
@FOREIGN
def test_what_another_drops_is_said_and_one_rule_of_theirs_cures_it(
    world: World, name: str, order: str
) -> None:
    for tap in ("a-0", "b-0"):
        ip(f"link set {tap} group 30317")
    there = world.internet()
    load_beside(world, name, order)
    assert nft.find_obstacles() == OBSTACLES[name]
    with there.udp_socket(PORT, INTERNET) as server:
        world.say(A, INTERNET, PORT)
        assert (received(server, SHORT) is None) == bool(OBSTACLES[name])
        load(CURES[name])
        world.say(A, INTERNET, PORT)
        server.settimeout(WAIT)
        data, sender = server.recvfrom(100)
        assert (data, sender[0]) == (b"hello", WAN), "masqueraded"
        server.sendto(b"answer", sender)
        assert world.taps["a-0"].receive(b"answer")
    with there.udp_socket(PORT, INTERNET6) as server:
        world.say(A, INTERNET6, PORT)
        assert received(server) is not None
    assert world.kinds("a-0") == {}


@ORDERS
def test_containers_go_on_beside_us(world: World, order: str) -> None:
    """Docker's own traffic is forwarded and masqueraded by docker's rules; ours say nothing of it."""
    there = world.internet()
    with peer("docker0", "172.17.0.2/16") as container, there.udp_socket(PORT, INTERNET) as server:
        ip("addr add 172.17.0.1/16 dev docker0")
        container.ip("route add default via 172.17.0.1")
        load_beside(world, "docker", order)
        with container.udp_socket(PORT) as client:
            client.sendto(b"hello", (INTERNET, PORT))
            got = received(server)
            assert got == (b"hello", WAN)
            server.sendto(b"answer", (WAN, PORT))
            assert received(client) is not None
        with container.udp_socket(PORT) as client:
            client.sendto(b"hello", ("10.0.1.1", PORT))
            assert world.taps["a-0"].receive(b"hello", SHORT) is None
        world.say(A, "172.17.0.2", PORT)
    assert world.kinds("a-0") == {"inbound": 1, "denied": 1}


def test_a_flush_of_everything_is_noticed_and_cured(world: World) -> None:
    text = world.install()
    assert nft.is_installed(text)
    run("nft", "flush", "ruleset")
    assert not nft.is_installed(text)
    assert not nft.has_rules()
    assert nft.read_counts() == {}
    nft.apply(text)
    assert nft.is_installed(text)


@pytest.mark.parametrize("family", ["inet", "netdev"])
def test_half_of_it_is_not_installed(world: World, family: str) -> None:
    text = world.install()
    run("nft", "delete", "table", family, "vmsilo")
    assert not nft.is_installed(text)
    assert not nft.has_rules()


def test_older_rules_are_not_these(world: World) -> None:
    text = world.install()
    newer = render_ruleset(replace(world.plan, ports=(A,)), nft.look_around(world.plan))
    assert nft.is_installed(text)
    assert not nft.is_installed(newer)


def test_a_tap_that_is_not_hooked_is_noticed(world: World) -> None:
    text = world.install()
    run("nft", "delete", "chain", "netdev", "vmsilo", "in-a-0")
    assert not nft.is_installed(text)


def test_a_tap_that_does_not_exist_holds_up_nobody(world: World) -> None:
    world.change(A, replace(B, vm="later", tap="later-0"))
    text = render_ruleset(world.plan, nft.look_around(world.plan))
    assert nft.is_installed(text)
    assert "in-later-0" not in text
    world.say(A, "10.0.2.1")
    assert world.kinds("a-0") == {"denied": 1}


def test_a_ruleset_that_is_refused_leaves_the_old_one(world: World) -> None:
    text = world.install()
    world.say(A, "10.0.2.1")
    with pytest.raises(Failed, match="nft refuses"):
        nft.apply(text + "add rule inet vmsilo nowhere drop\n")
    assert nft.is_installed(text)
    assert world.kinds("a-0") == {"denied": 1}


def test_replacing_the_rules_lets_nothing_through(world: World) -> None:
    """One transaction: no frame meets no rules."""
    texts = [render_ruleset(replace(world.plan, ports=ports)) for ports in ((A, B), (B, A), (A,))]
    lie = packets.udp(world.way(A, "10.0.1.254").of(source="10.0.1.77"), 1, PORT)
    for text in texts * 3:
        loading = subprocess.Popen(["nft", "-f", "-"], stdin=subprocess.PIPE, text=True)
        assert loading.stdin is not None
        loading.stdin.write(text)
        loading.stdin.close()
        while loading.poll() is None:
            world.send(A, *[lie] * 20)
        assert loading.returncode == 0
    assert world.passed("a-0") == 0
