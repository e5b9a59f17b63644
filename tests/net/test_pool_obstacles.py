"""Whose rules keep VMs from the internet is in the journal: vmsilo cannot open what another drops."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
from net import foreign
from pool_tools import applied, ip, nft, pool_at, require_workers_here, vm

if TYPE_CHECKING:
    from pathlib import Path

    from vmsilod.network.pool import NetworkPool


@pytest.fixture
def pool(tmp_path: Path) -> NetworkPool:
    require_workers_here()
    return pool_at(tmp_path / "lent")


def obstacles_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return [line for line in said if "may not reach the internet" in line]


def test_whose_chain_keeps_vms_from_the_internet_is_told_once(
    pool: NetworkPool, caplog: pytest.LogCaptureFixture
) -> None:
    ip("link", "add", "wan", "type", "veth", "peer", "name", "far")
    nft(foreign.ALL["docker"])
    applied(pool, vm(1))
    assert obstacles_in(caplog) == [], "without NAT no VM is to reach it"
    applied(pool, vm(1), nat="wan")
    (line,) = obstacles_in(caplog)
    assert "what is forwarded is dropped by ip filter FORWARD (docs/networks.md" in line
    applied(pool, vm(1), vm(2), nat="wan")
    assert obstacles_in(caplog) == []
    nft(foreign.ALL["ufw"])
    applied(pool, vm(1), nat="wan")
    (line,) = obstacles_in(caplog)
    assert "by ip filter FORWARD, ip6 filter FORWARD (" in line
    nft("flush", "ruleset")
    applied(pool, vm(1), nat="wan")
    assert obstacles_in(caplog) == []
    nft(foreign.ALL["docker"])
    applied(pool, vm(1), nat="wan")
    assert len(obstacles_in(caplog)) == 1, "what came back is told again"


def test_who_lets_vms_pass_is_no_obstacle(pool: NetworkPool, caplog: pytest.LogCaptureFixture) -> None:
    ip("link", "add", "wan", "type", "veth", "peer", "name", "far")
    nft(foreign.ALL["open"])
    applied(pool, vm(1), nat="wan")
    assert obstacles_in(caplog) == []
