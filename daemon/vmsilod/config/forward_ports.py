"""The tables of `network.forward_ports`: which ports of the host lead into a VM, and which of the guest's
lead out of it.

Called by the schema. Pure: whether a port is free is seen when the VM starts. In the models an address is
always there ("127.0.0.1:5432"); a port alone means the host's own loopback.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

FORWARDS_MAX = 64  # per VM: their listeners travel in one message, which takes at most 253 descriptors
PORT_MAX = 65535
LOOPBACK = "127.0.0.1"
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([0-9]{1,5})")


def _expand_from(value: Any) -> Any:  # whatever TOML gave; pydantic checks the result
    """`from` is a word of Python, so no field can have that name."""
    if not isinstance(value, dict) or "from" not in value:
        return value
    return {"side": value["from"]} | {key: item for key, item in value.items() if key != "from"}


def _expand_host(value: Any) -> Any:  # as above
    return f"{LOOPBACK}:{value}" if isinstance(value, int) and not isinstance(value, bool) else value


def _check_host(text: str) -> str:
    match = _HOST.fullmatch(text)
    try:
        address = ip_address((match[1] or match[2]) if match else "")
    except ValueError as exc:
        raise ValueError(
            f'\'{text}\' is neither a port nor "ADDRESS:PORT" ("[ADDRESS]:PORT" for IPv6)'
        ) from exc
    assert match is not None
    if (match[1] is not None) != (address.version == 6):
        raise ValueError(f"'{text}': brackets belong around an IPv6 address, and around no other")
    port = int(match[3])
    if not 1 <= port <= PORT_MAX:
        raise ValueError(f"'{text}': a port is a number from 1 to {PORT_MAX}")
    if address.is_multicast:
        raise ValueError(f"'{text}' is a multicast address, which takes no connection")
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


class ForwardPort(BaseModel):
    """side "host": who connects to `host` on the host reaches `guest` on the guest's loopback.
    side "guest": who connects to `guest` on the guest's loopback reaches `host`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    side: Literal["host", "guest"]
    host: Annotated[str, BeforeValidator(_expand_host), AfterValidator(_check_host)]
    guest: Annotated[int, Field(ge=1, le=PORT_MAX)]

    @property
    def host_address(self) -> IPv4Address | IPv6Address:
        return ip_address(self.host.rpartition(":")[0].strip("[]"))

    @property
    def host_port(self) -> int:
        return int(self.host.rpartition(":")[2])


def _check_forwards(forwards: tuple[ForwardPort, ...]) -> tuple[ForwardPort, ...]:
    if len(forwards) > FORWARDS_MAX:
        raise ValueError(f"{len(forwards)} forwards, more than {FORWARDS_MAX}")
    listening: list[ForwardPort] = []
    in_guest: set[int] = set()
    for forward in forwards:
        if forward.side == "guest":
            if forward.host_address.is_unspecified:
                raise ValueError(f"{forward.host} is where one listens, not where one connects to")
            if forward.guest in in_guest:
                raise ValueError(f"the guest's port {forward.guest} is forwarded more than once")
            in_guest.add(forward.guest)
            continue
        for other in listening:
            if _collide(forward, other):
                raise ValueError(f"{forward.host} and {other.host} are the same port of the host")
        listening.append(forward)
    return forwards


def _collide(one: ForwardPort, other: ForwardPort) -> bool:
    """Whether the second bind would fail. An IPv6 listener takes no IPv4 here."""
    if one.host_port != other.host_port or one.host_address.version != other.host_address.version:
        return False
    anywhere = one.host_address.is_unspecified or other.host_address.is_unspecified
    return anywhere or one.host_address == other.host_address


ForwardPorts = Annotated[
    tuple[Annotated[ForwardPort, BeforeValidator(_expand_from)], ...],
    Field(strict=False),
    AfterValidator(_check_forwards),
]
