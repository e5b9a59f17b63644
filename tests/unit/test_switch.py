"""VM-to-VM networks on paper: unit names and texts, routes, the ruleset's seal."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address, ip_interface, ip_network
from typing import TYPE_CHECKING

import pytest
from vmsilod.network.plan import Port
from vmsilod.network.routes import Neighbour, Way
from vmsilod.network.switch_batch import plan_ways
from vmsilod.network.switch_ruleset import eui64_of, render_switch_ruleset, seal_of
from vmsilod.network.switch_units import _find_files, _remove_files, _write_files
from vmsilod.units import files
from vmsilod.units.switch import network_of, render_switch, switch_unit

if TYPE_CHECKING:
    from pathlib import Path

A = Port("a", "lan", "a-0", "02:00:00:00:00:0a", network="n", addresses=(ip_interface("10.1.0.2/24"),))
ROUTER = Port(
    "r",
    "lan",
    "r-0",
    "02:00:00:00:00:0b",
    network="n",
    addresses=(ip_interface("10.1.0.254/24"), ip_interface("fd00::1/64")),
    served=(ip_network("0.0.0.0/0"), ip_network("fd09::/64")),
)


def test_no_unit_of_a_network_is_taken_for_one_of_a_vm() -> None:
    for network in ("office", "x-vm", "x-debug", "relayd", "consoled", "x-switch"):
        unit = switch_unit(network)
        assert network_of(unit) == network
        assert not files.OUR_FILE.fullmatch(unit)
    for vm in ("office", "office-switch", "switch"):
        for unit in (f"vmsilo-{vm}-vm.service", f"vmsilo-{vm}-debug.service", f"vmsilo-{vm}.socket"):
            assert network_of(unit) is None


@pytest.mark.parametrize("name", ["", "A", "a b", "a\nb", "a%b", "../x", "x" * 32, "-x"])
def test_what_is_no_name_makes_no_unit(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a network"):
        switch_unit(name)


def test_units_are_written_once_and_only_ours_are_removed(tmp_path: Path) -> None:
    assert _write_files(tmp_path, ["office"])
    assert not _write_files(tmp_path, ["office"])
    assert "PrivateNetwork=yes" in render_switch("office").splitlines()
    foreign = tmp_path / switch_unit("mine")
    foreign.write_text("[Service]\n")
    assert _find_files(tmp_path) == {switch_unit("office")}
    assert _remove_files(tmp_path, [switch_unit("office"), foreign.name])
    assert list(tmp_path.iterdir()) == [foreign]


def test_routes_lead_to_each_address_and_to_what_routers_serve() -> None:
    ways, neighbours = plan_ways([A, ROUTER], {"a-0": 2, "r-0": 3})
    assert ways == {
        Way(ip_network("10.1.0.2/32"), 2),
        Way(ip_network("10.1.0.254/32"), 3),
        Way(ip_network("fd00::1/128"), 3),
        Way(ip_network("0.0.0.0/0"), 3, ip_address("10.1.0.254")),
        Way(ip_network("fd09::/64"), 3, ip_address("fd00::1")),
    }
    assert neighbours == {
        Neighbour(ip_address("10.1.0.2"), 2, A.mac),
        Neighbour(ip_address("10.1.0.254"), 3, ROUTER.mac),
        Neighbour(ip_address("fd00::1"), 3, ROUTER.mac),
        Neighbour(ip_address("fd00::1"), 2),  # which is answered for on A's port
    }


def test_the_seal_tells_other_ports_and_devices_that_were_made_anew() -> None:
    texts = [
        render_switch_ruleset([A], {"a-0": 2}),
        render_switch_ruleset([A], {"a-0": 5}),
        render_switch_ruleset([A, ROUTER], {"a-0": 2, "r-0": 3}),
    ]
    seals = {seal_of(text) for text in texts}
    assert len(seals) == 3
    assert all(len(seal) == 64 for seal in seals)
    assert "SEAL" not in texts[0]


def test_a_link_local_address_is_made_of_the_mac() -> None:
    assert eui64_of("52:54:00:12:34:56") == IPv6Address("fe80::5054:ff:fe12:3456")
