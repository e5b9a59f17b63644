"""What `network.forward_ports` may say."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from vmsilod.config.forward_ports import FORWARDS_MAX, ForwardPorts

FORWARDS: TypeAdapter[Any] = TypeAdapter(ForwardPorts)


def parse(*tables: dict[str, Any]) -> list[tuple[str, str, int]]:
    return [(forward.side, forward.host, forward.guest) for forward in FORWARDS.validate_python([*tables])]


def test_a_port_alone_is_on_the_loopback() -> None:
    assert parse(
        {"from": "host", "host": "127.0.0.1:2222", "guest": 22},
        {"from": "guest", "guest": 5432, "host": 5432},
    ) == [("host", "127.0.0.1:2222", 22), ("guest", "127.0.0.1:5432", 5432)]


def test_an_address_is_kept_in_its_shortest_form() -> None:
    assert parse({"from": "host", "host": "[0:0::1]:80", "guest": 80}) == [("host", "[::1]:80", 80)]


def test_what_is_stored_with_a_run_is_read_again() -> None:
    forwards = FORWARDS.validate_python([{"from": "guest", "host": 53, "guest": 53}])
    assert FORWARDS.validate_json(FORWARDS.dump_json(forwards)) == forwards
    assert (str(forwards[0].host_address), forwards[0].host_port) == ("127.0.0.1", 53)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"from": "host", "host": "localhost:80", "guest": 80}, "neither a port nor"),
        ({"from": "host", "host": "127.0.0.1:70000", "guest": 80}, "from 1 to 65535"),
        ({"from": "host", "host": "127.0.0.1:0", "guest": 80}, "from 1 to 65535"),
        ({"from": "host", "host": 0, "guest": 80}, "from 1 to 65535"),
        ({"from": "host", "host": "::1:80", "guest": 80}, "neither a port nor"),
        ({"from": "host", "host": "[127.0.0.1]:80", "guest": 80}, "brackets"),
        ({"from": "host", "host": "[fe80::1%eth0]:80", "guest": 80}, "neither a port nor"),
        ({"from": "host", "host": "224.0.0.1:80", "guest": 80}, "multicast"),
        ({"from": "host", "host": True, "guest": 80}, "string"),
        ({"from": "host", "host": 80, "guest": "80"}, "integer"),
        ({"from": "host", "host": 80, "guest": 65536}, "65535"),
        ({"from": "lan", "host": 80, "guest": 80}, "'host' or 'guest'"),
        ({"from": "guest", "host": "0.0.0.0:80", "guest": 80}, "where one listens"),
        ({"host": 80, "guest": 80}, "required"),
        ({"from": "host", "host": 80, "guest": 80, "protocol": "udp"}, "not permitted"),
    ],
)
def test_what_cannot_be_meant_is_refused(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        parse(table)


def test_two_forwards_of_one_port_are_refused() -> None:
    http = {"from": "host", "host": "127.0.0.1:80", "guest": 80}
    with pytest.raises(ValidationError, match="same port of the host"):
        parse(http, {"from": "host", "host": "0.0.0.0:80", "guest": 81})
    with pytest.raises(ValidationError, match="port 80 is forwarded more than once"):
        parse(*({"from": "guest", "host": port, "guest": 80} for port in (80, 81)))
    both = parse(
        http, {"from": "host", "host": "[::]:80", "guest": 80}, {"from": "guest", "host": 1, "guest": 80}
    )
    assert len(both) == 3


def test_there_is_a_most() -> None:
    with pytest.raises(ValidationError, match="more than"):
        parse(*({"from": "host", "host": port, "guest": 80} for port in range(1, FORWARDS_MAX + 2)))
