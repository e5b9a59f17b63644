"""A real guest behind NAT beside real firewalls: docker's, firewalld, ufw. Whoever starts first, theirs stay
as they are, what vmsilo denies stays denied, and the recipes of docs/networks.md let the guest out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from e2e.internet import INTERNET, ROUTER, WAN, ask, define, internet, remove

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.container import Container

VM = """\
memory = 768
[network.interfaces.wan]
tap.host_address = "10.77.2.1/24"
addresses = ["10.77.2.2/24"]
routes = { "0.0.0.0/0" = { via = "10.77.2.1" } }
"""
NAME, TAP, HOST = "walled", "walled-0", "10.77.2.1"


@dataclass(frozen=True)
class Firewall:
    """How an administrator starts it, lets VMs through by our documents, and ends it; the chain of its own
    that vmsilo is to name.
    """

    name: str
    start: str
    cure: str
    end: str
    chain: str


_UFW_RULE = "-A {} -m devgroup --src-group 30317 -j ACCEPT"
_UFW_CURE = "; ".join(
    f"sed -i 's/^COMMIT/{_UFW_RULE.format(chain)}\\n&/' /etc/ufw/{file}"
    for chain, file in (("ufw-before-forward", "before.rules"), ("ufw6-before-forward", "before6.rules"))
)
_CMD = "firewall-cmd -q --permanent"
_POLICY = f"{_CMD} --policy=vmsilo-out"
FIREWALLS = (
    Firewall(
        "docker",
        "systemctl start docker.service",
        "for side in src dst; do iptables -I DOCKER-USER -m devgroup --$side-group 30317 -j ACCEPT; done",
        "systemctl stop docker.service docker.socket containerd.service; ip link del docker0;"
        " for table in 'ip filter' 'ip nat' 'ip6 filter' 'ip6 nat'; do nft delete table $table; done; true",
        "ip filter FORWARD",
    ),
    Firewall(
        "firewalld",
        "systemctl start firewalld.service",
        f"set -e; {_CMD} --new-zone=vmsilo; {_CMD} --zone=vmsilo --add-interface={TAP};"
        f" {_CMD} --new-policy=vmsilo-out; {_POLICY} --add-ingress-zone=vmsilo;"
        f" {_POLICY} --add-egress-zone=ANY; {_POLICY} --set-target=ACCEPT; firewall-cmd -q --reload",
        "systemctl stop firewalld.service",
        "inet firewalld filter_FORWARD",
    ),
    Firewall(
        "ufw",
        "ufw --force enable",
        f"{_UFW_CURE}; ufw reload",
        "ufw disable; for family in ip ip6; do nft delete table $family filter; done; true",
        "ip filter FORWARD",
    ),
)
FOREIGN = (
    "nft list tables | grep -v ' vmsilo$' | while read _ family table;"
    " do nft -a -s list table $family $table; done"
)
WITHOUT_OURS = (
    "systemctl stop vmsilod.service; for family in inet netdev; do nft delete table $family vmsilo; done"
)
# By the vmsilod that runs: one before it may have named the same chain of another firewall.
SAID = 'journalctl -q -o cat _SYSTEMD_INVOCATION_ID="$(systemctl show -P InvocationID vmsilod.service)"'


@pytest.fixture(scope="module")
def walled(host: Container) -> Iterator[Container]:
    """The VM `walled`, running; no firewall but vmsilo's."""
    with internet(host):
        define(host, NAME, VM)
        host.run(["vm-start", "--wait", NAME], user="user")
        yield host
        remove(host, NAME)


@pytest.fixture(params=FIREWALLS, ids=[each.name for each in FIREWALLS])
def firewall(walled: Container, request: pytest.FixtureRequest) -> Iterator[Firewall]:
    found: Firewall = request.param
    before = walled.run(FOREIGN).stdout
    yield found
    walled.run(found.end)
    assert walled.run(FOREIGN).stdout == before
    # Docker leaves the whole host forwarding. Whoever ends that does not end it for our VM.
    walled.run("sysctl -qw net.ipv4.ip_forward=0")
    assert ask(walled, NAME, INTERNET) == WAN


def assert_closed_but_internet(host: Container) -> None:
    assert ask(host, NAME, INTERNET) == WAN
    assert ask(host, NAME, ROUTER) == "closed"  # a neighbour of this host
    assert ask(host, NAME, HOST) == "closed"


def test_one_that_starts_later_and_then_one_that_was_first(walled: Container, firewall: Firewall) -> None:
    walled.run(firewall.start)
    assert ask(walled, NAME, INTERNET) == "closed", f"{firewall.name} lets through what it does not know"
    walled.run(firewall.cure)
    assert_closed_but_internet(walled)
    # Now theirs is there first. vmsilo comes, and says what may be in the way.
    theirs = walled.run(FOREIGN).stdout
    walled.run(WITHOUT_OURS)
    walled.run("systemctl start vmsilod.service")
    assert_closed_but_internet(walled)
    assert walled.run(FOREIGN).stdout == theirs
    said = walled.run(SAID).stdout
    assert f"what is forwarded is dropped by {firewall.chain}" in said
