"""What networkd and resolved of a guest read."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_interface, ip_network

import pytest
from vmsilo_image.cpio import NETWORK_FILE
from vmsilod.network.guest import plan_guest_files, plan_ifnames
from vmsilod.network.names import derive_link_local
from vmsilod.network.plan import Port, Route

WAN = Port(
    vm="banking",
    interface="wan",
    tap="banking-0",
    mac="52:54:00:12:34:56",
    host_addresses=(ip_interface("10.0.0.254/24"),),
    addresses=(ip_interface("10.0.0.1/24"),),
    routes=(Route(ip_network("0.0.0.0/0"), "10.0.0.254"),),
    nameservers=("1.1.1.1", "9.9.9.9"),
)
PEERS = Port(
    vm="banking",
    interface="peers",
    tap="banking-1",
    mac="0e:00:00:00:00:01",
    network="office",
    addresses=(ip_interface("10.9.0.1/32"), ip_interface("fd00:9::1/128")),
    routes=(Route(ip_network("10.9.0.0/24"), "10.9.0.2"), Route(ip_network("fd00:9::/64"), "fe80::2")),
    nameservers=("1.1.1.1", "9.9.9.9"),
)
LAN = Port(vm="desk", interface="lan", tap="desk-0", mac="0e:00:00:00:00:02", bridge="br0", dhcp=True)


def network_of(port: Port) -> str:
    return plan_guest_files([port])[f"network/10-vmsilo-{port.interface}.network"]


def value_of(text: str, section: str, key: str) -> str:
    [lines] = sections_of(text, section)
    return dict(line.split("=", 1) for line in lines)[key]


def sections_of(text: str, name: str) -> list[list[str]]:
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return [lines[1:] for lines in blocks if lines[0] == f"[{name}]"]


def test_a_vm_without_interfaces_has_no_files() -> None:
    assert plan_guest_files([]) == {}
    assert plan_ifnames([]) == ()


def test_a_static_interface() -> None:
    assert plan_guest_files([WAN]) == {
        "network/10-vmsilo-wan.link": "[Match]\nPermanentMACAddress=52:54:00:12:34:56\n\n[Link]\nName=wan\n",
        "network/10-vmsilo-wan.network": (
            "[Match]\nPermanentMACAddress=52:54:00:12:34:56\n\n"
            "[Link]\nRequiredForOnline=routable\n\n"
            "[Network]\nDHCP=no\nLinkLocalAddressing=no\nIPv6AcceptRA=no\nLLDP=no\nLLMNR=no\nMulticastDNS=no\n\n"
            "[Address]\nAddress=10.0.0.1/24\n\n"
            "[Route]\nDestination=0.0.0.0/0\nGateway=10.0.0.254\n"
        ),
        "resolved.conf.d/10-vmsilo.conf": (
            "[Resolve]\nDNS=1.1.1.1 9.9.9.9\nFallbackDNS=\nLLMNR=no\nMulticastDNS=no\n"
        ),
    }
    assert plan_ifnames([WAN, PEERS]) == (("wan", "52:54:00:12:34:56"), ("peers", "0e:00:00:00:00:01"))


@pytest.mark.parametrize("port", [WAN, PEERS, LAN])
def test_no_router_advertisement_is_listened_to(port: Port) -> None:
    assert value_of(network_of(replace(port, addresses=(), routes=())), "Network", "IPv6AcceptRA") == "no"


def test_ipv6_has_the_link_local_address_of_its_mac_and_no_detection_among_vms() -> None:
    assert sections_of(network_of(PEERS), "Address") == [
        ["Address=10.9.0.1/32"],
        ["Address=fd00:9::1/128", "DuplicateAddressDetection=none"],
        ["Address=fe80::c00:ff:fe00:1/64", "DuplicateAddressDetection=none"],
    ]
    own = replace(PEERS, addresses=(ip_interface("fd00:9::1/64"), ip_interface("fe80::9/64")))
    assert not any(
        "fe80::c00" in line for lines in sections_of(network_of(own), "Address") for line in lines
    )


def test_among_strangers_a_duplicate_address_is_looked_for() -> None:
    assert "DuplicateAddressDetection" not in network_of(replace(PEERS, network="", bridge="br0"))


def test_link_local_addresses_are_those_of_eui_64() -> None:
    assert str(derive_link_local("00:00:5e:00:53:01")) == "fe80::200:5eff:fe00:5301"


def test_a_gateway_beside_every_subnet_is_on_the_link() -> None:
    assert sections_of(network_of(PEERS), "Route") == [
        ["Destination=10.9.0.0/24", "Gateway=10.9.0.2", "GatewayOnLink=yes"],
        ["Destination=fd00:9::/64", "Gateway=fe80::2"],
    ]


def test_a_route_without_gateway_is_one_to_the_link() -> None:
    port = replace(WAN, routes=(Route(ip_network("10.7.0.0/16"), ""),))
    assert sections_of(network_of(port), "Route") == [["Destination=10.7.0.0/16"]]


def test_dhcp_brings_addresses_and_name_servers_and_tells_nothing_of_the_vm() -> None:
    text = network_of(LAN)
    assert value_of(text, "Network", "DHCP") == "ipv4"
    assert value_of(text, "DHCPv4", "UseDNS") == "yes"
    assert value_of(text, "DHCPv4", "SendHostname") == "no"
    # Of a lease that was given to the machine ID of an earlier boot the server would know nothing.
    assert value_of(text, "DHCPv4", "ClientIdentifier") == "mac"
    assert "DNS=\n" in plan_guest_files([LAN])["resolved.conf.d/10-vmsilo.conf"]


def test_configured_name_servers_are_the_only_ones() -> None:
    port = replace(LAN, nameservers=("1.1.1.1",))
    assert value_of(network_of(port), "DHCPv4", "UseDNS") == "no"
    beside = plan_guest_files([WAN, replace(LAN, vm="banking")])["network/10-vmsilo-lan.network"]
    assert value_of(beside, "DHCPv4", "UseDNS") == "no"


def test_default_routes_of_two_dhcp_interfaces_differ() -> None:
    files = plan_guest_files([LAN, replace(LAN, interface="lan2", mac="0e:00:00:00:00:03")])
    metrics = {
        value_of(text, "DHCPv4", "RouteMetric") for name, text in files.items() if name.endswith(".network")
    }
    assert len(metrics) == 2


def test_no_name_server_no_resolver() -> None:
    assert list(plan_guest_files([replace(WAN, nameservers=())])) == [
        "network/10-vmsilo-wan.link",
        "network/10-vmsilo-wan.network",
    ]


def test_a_router_forwards() -> None:
    router = replace(PEERS, served=(ip_network("0.0.0.0/0"),))
    text = plan_guest_files([WAN, router])["networkd.conf.d/10-vmsilo.conf"]
    assert sections_of(text, "Network") == [["IPv4Forwarding=yes", "IPv6Forwarding=yes"]]
    assert "networkd.conf.d/10-vmsilo.conf" not in plan_guest_files([WAN, PEERS])


@pytest.mark.parametrize(
    ("addresses", "dhcp", "state"),
    [
        (("10.0.0.1/24",), False, "routable"),
        ((), True, "routable"),
        (("fe80::1/64", "169.254.0.1/16"), False, "degraded"),
        ((), False, "carrier"),
    ],
)
def test_ready_waits_for_what_the_interface_can_reach(
    addresses: tuple[str, ...], *, dhcp: bool, state: str
) -> None:
    port = replace(LAN, dhcp=dhcp, addresses=tuple(ip_interface(each) for each in addresses))
    assert value_of(network_of(port), "Link", "RequiredForOnline") == state


@pytest.mark.parametrize("bad", ["10.0.0.1\nDNS=6.6.6.6", "x", "1.1.1.1 "])
def test_what_is_no_address_stands_in_no_file(bad: str) -> None:
    with pytest.raises(ValueError, match="does not appear"):
        plan_guest_files([replace(WAN, nameservers=(bad,))])
    with pytest.raises(ValueError, match="does not appear"):
        plan_guest_files([replace(WAN, routes=(Route(ip_network("0.0.0.0/0"), bad),))])


def test_the_archive_takes_every_file() -> None:
    router = replace(PEERS, served=(ip_network("0.0.0.0/0"),))
    assert all(NETWORK_FILE.fullmatch(name) for name in plan_guest_files([WAN, router, LAN]))
