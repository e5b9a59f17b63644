"""The global table [disposables]: what one is made of when nobody says it, and how many there may be.

Part of the models of `schema.py`. Pure.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import AfterValidator, Field

from vmsilod.config import addresses
from vmsilod.config.table import Table

V4_BITS = 30
"""Prefix of the network that one interface of a disposable gets: the host's address and the guest's."""
V6_BITS = 64
LIMIT_MAX = 1000


def _check_v4_pool(text: str) -> str:
    text = addresses.check_v4_network(text)
    if ipaddress.ip_network(text).prefixlen > V4_BITS - 1:
        raise ValueError(f"'{text}' is too small: each disposable takes a /{V4_BITS} of it")
    return text


def _check_v6_pool(text: str) -> str:
    text = addresses.check_v6_network(text)
    if ipaddress.ip_network(text).prefixlen > V6_BITS - 1:
        raise ValueError(f"'{text}' is too small: each disposable takes a /{V6_BITS} of it")
    return text


class DisposableOptions(Table):
    """`template` is a VM's name, checked like one by the loader; None for the built-in template. `limit` is
    how many one user may have at a time.
    """

    template: str | None = None
    limit: Annotated[int, Field(ge=1, le=LIMIT_MAX)] = 16
    network: Annotated[str, AfterValidator(_check_v4_pool)] = "10.138.0.0/16"
    network_v6: Annotated[str, AfterValidator(_check_v6_pool)] = "fd76:6d73:696c::/48"
