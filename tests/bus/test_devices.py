"""The methods about PCI devices: who may call them, and what they answer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
from bus.client import BusError, Client, as_user
from bus.conftest import OWNER, STRANGER, served

if TYPE_CHECKING:
    from collections.abc import Iterator

DENIED = "org.vmsilo1.Error.Denied"


@pytest.fixture
def bus(real_polkit: str) -> Iterator[str]:
    with served(real_polkit):
        yield real_polkit


def list_devices(address: str) -> list[dict[str, object]]:
    devices = Client(address).manager("ListPci")
    return [{key: value for key, (_signature, value) in device.items()} for device in devices]


def manage(address: str, method: str, device: str) -> object:
    try:
        return Client(address).manager(method, "s", device)
    except BusError as error:
        return error.args[0]


def test_the_owner_sees_claims_and_releases(bus: str) -> None:
    (device,) = as_user(OWNER, partial(list_devices, bus))
    assert device == {
        "Address": "0000:01:00.0",
        "Class": "0200",
        "Name": "A card",
        "Driver": "vfio-pci",
        "Group": 7,
        "State": "used",
        "Vm": "banking",
        "Isolated": True,
        "Resets": ["flr"],
        "Note": "",
    }
    assert as_user(OWNER, partial(manage, bus, "ClaimPci", "02:00.0")) is None
    assert as_user(OWNER, partial(manage, bus, "ReleasePci", "0000:02:00.0")) == "e1000e"


@pytest.mark.parametrize("method", ["ClaimPci", "ReleasePci"])
def test_a_stranger_may_not(bus: str, method: str) -> None:
    assert as_user(STRANGER, partial(manage, bus, method, "01:00.0")) == DENIED
    assert len(as_user(OWNER, partial(list_devices, bus))) == 1


def test_a_stranger_does_not_see_them(bus: str) -> None:
    with pytest.raises(BusError, match="Denied"):
        as_user(STRANGER, partial(list_devices, bus))


def test_what_is_no_address_is_told_before_anybody_is_asked(bus: str) -> None:
    for text in ("../../x", "01:00.0\n", ""):
        assert as_user(OWNER, partial(manage, bus, "ClaimPci", text)) == "org.vmsilo1.Error.BadRequest"
