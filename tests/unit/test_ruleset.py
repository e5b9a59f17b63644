"""The text of the firewall: what it is made of, what cannot get into it, and how it is told from another."""

from __future__ import annotations

import re
from dataclasses import replace
from ipaddress import ip_interface, ip_network

import pytest
from vmsilod.errors import Failed
from vmsilod.network.plan import Allow, NetworkPlan, Port
from vmsilod.network.ruleset import Surroundings, render_ruleset, taps_in, version_in

PORT = Port(
    vm="banking",
    interface="wan",
    tap="banking-0",
    mac="02:00:00:00:00:01",
    host_addresses=(ip_interface("10.0.0.254/24"),),
    addresses=(ip_interface("10.0.0.1/24"),),
    allow=(Allow(ip_network("192.168.1.0/24"), "tcp", (80, 90)),),
)
PLAN = NetworkPlan((PORT,), "eth0")


def with_port(**changes: object) -> NetworkPlan:
    return replace(PLAN, ports=(replace(PORT, **changes),))  # type: ignore[arg-type]  # keys of Port


@pytest.mark.parametrize("name", ["tap*", 'a"b', "a b", "", "a;b", "a{", "a\nb", "$x", "ä"])
def test_a_name_that_means_more_to_nft_is_refused(name: str) -> None:
    for plan in (
        with_port(tap=name),
        with_port(vm=name),
        with_port(bridge=name) if name else with_port(tap=name),
    ):
        with pytest.raises(Failed, match="cannot be in a firewall rule"):
            render_ruleset(plan)


def test_a_mac_that_is_none_is_refused() -> None:
    with pytest.raises(Failed, match="not a MAC"):
        render_ruleset(with_port(mac="02:00:00:00:00:01 } ; drop"))


@pytest.mark.parametrize(
    "entry",
    [
        Allow(ip_network("10.0.0.0/8"), "icmp", (1, 2)),
        Allow(ip_network("10.0.0.0/8"), "any }"),
        Allow(ip_network("10.0.0.0/8"), "", (1, 2)),
    ],
)
def test_an_entry_that_makes_no_rule_is_refused(entry: Allow) -> None:
    with pytest.raises(Failed, match="cannot be made"):
        render_ruleset(with_port(allow=(entry,)))


def test_the_version_is_of_all_that_matters() -> None:
    texts = [
        render_ruleset(plan, surroundings)
        for plan, surroundings in (
            (PLAN, None),
            (replace(PLAN, nat_interface=""), None),
            (with_port(mac="02:00:00:00:00:02"), None),
            (with_port(allow=()), None),
            (with_port(nameservers=("192.0.2.1",)), None),
            (with_port(dhcp=True), None),
            (PLAN, Surroundings(nearby=(ip_network("203.0.113.0/24"),))),
            (PLAN, Surroundings(devices=frozenset())),
        )
    ]
    versions = [version_in(text) for text in texts]
    assert len(set(versions)) == len(versions)
    assert all(text.count(version) == 2 for text, version in zip(texts, versions, strict=True))
    assert render_ruleset(PLAN) == texts[0]


def test_what_the_guest_alone_knows_makes_no_new_rules() -> None:
    assert version_in(render_ruleset(with_port(queues=4))) == version_in(render_ruleset(PLAN))


def test_taps_that_exist_are_hooked_and_those_of_a_switch_are_not_ours() -> None:
    assert taps_in(render_ruleset(PLAN)) == {"banking-0"}
    assert taps_in(render_ruleset(PLAN, Surroundings(devices=frozenset({"lo"})))) == frozenset()
    for changes in ({"network": "office"}, {"link": "eth0"}):
        text = render_ruleset(with_port(host_addresses=(), **changes))
        assert "banking" not in text


def test_without_vms_there_is_nothing_but_what_drops() -> None:
    text = render_ruleset(NetworkPlan())
    assert "hook ingress" not in text
    assert "masquerade" not in text


def test_overlapping_networks_are_one() -> None:
    entries = tuple(Allow(ip_network(net)) for net in ("10.0.0.0/8", "10.1.0.0/16", "10.0.0.0/8"))
    assert "ip daddr { 10.0.0.0/8 } accept" in render_ruleset(with_port(allow=entries))
    text = render_ruleset(PLAN, Surroundings(nearby=(ip_network("10.0.0.0/24"), ip_network("0.0.0.0/8"))))
    closed = re.search(r"set closed4 \{[^}]*elements = \{([^}]*)\}", text)
    assert closed is not None
    networks = closed[1].strip().split(", ")
    assert "10.0.0.0/24" not in networks
    assert len(networks) == len(set(networks))


def test_each_vm_adds_the_same_number_of_rules_and_chains_to_none_but_its_own() -> None:
    """What all VMs' packets pass is the same text for one VM and for many: sets and maps alone grow."""

    def shared(number: int) -> str:
        ports = tuple(
            replace(
                PORT,
                vm=f"vm{index}",
                tap=f"vm{index}-0",
                mac=f"02:00:00:00:00:{index:02x}",
                host_addresses=(ip_interface(f"10.0.{index}.254/24"),),
                addresses=(ip_interface(f"10.0.{index}.1/24"),),
            )
            for index in range(number)
        )
        text = render_ruleset(NetworkPlan(ports, "eth0"))
        text = re.sub(r"\tchain \S+-vm\d+-0 \{\n(\t\t.*\n)*\t\}\n", "", text)
        text = re.sub(r"elements = \{[^}]*\}", "", text)
        return text.replace(version_in(text), "")

    assert shared(1) == shared(50)
