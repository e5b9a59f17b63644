"""Which device goes to which VM, and how one is named. Pure."""

from __future__ import annotations

import pytest
from vmsilod.errors import BadRequest
from vmsilod.usb.devices import UsbDevice
from vmsilod.usb.rules import Claim, UsbRule, choose_device, find_claim, parse_ids, rule_for

STICK = UsbDevice("1-2", 1, 5, "0951", "1666", "A1")
TWIN = UsbDevice("1-3.1", 1, 6, "0951", "1666", "B2")
PLAIN = UsbDevice("2-1", 2, 3, "046d", "c31c")
HUB = UsbDevice("1-3", 1, 4, "05e3", "0610", device_class=9)
DESK = [STICK, HUB, TWIN, PLAIN]

ANY = UsbRule("0951", "1666")
EXACT = UsbRule("0951", "1666", "A1")


def holder(device: UsbDevice, *claims: Claim, refused: tuple[tuple[str, UsbRule], ...] = ()) -> str:
    claim = find_claim(device, claims, refused)
    return claim.vm if claim else ""


def test_a_rule_with_a_serial_number_takes_that_device_only() -> None:
    assert holder(STICK, Claim("work", EXACT)) == "work"
    assert holder(TWIN, Claim("work", EXACT)) == ""


def test_a_rule_with_a_serial_number_beats_one_without_whoever_came_first() -> None:
    claims = (Claim("first", ANY, since=1), Claim("second", EXACT, since=2))
    assert holder(STICK, *claims) == "second"
    assert holder(TWIN, *claims) == "first"


def test_of_equal_rules_the_vm_that_was_started_first_has_it() -> None:
    assert holder(STICK, Claim("a", ANY, since=5), Claim("b", ANY, since=3)) == "b"


def test_what_was_attached_by_hand_beats_every_rule() -> None:
    assert holder(STICK, Claim("a", EXACT, since=1), Claim("b", ANY, since=2, by_hand=True)) == "b"


def test_what_was_detached_by_hand_stays_out_of_that_vm_and_no_other() -> None:
    refused = (("work", rule_for(STICK)),)
    claims = (Claim("work", ANY, since=1), Claim("play", ANY, since=2))
    assert holder(STICK, *claims, refused=refused) == "play"
    assert holder(TWIN, *claims, refused=refused) == "work"


def test_nobody_gets_a_hub() -> None:
    assert holder(HUB, Claim("work", UsbRule("05e3", "0610"))) == ""


def test_without_a_serial_number_a_device_comes_back_at_its_port() -> None:
    rule = rule_for(PLAIN)
    elsewhere = UsbDevice("2-4", 2, 9, "046d", "c31c")
    assert rule.matches(UsbDevice("2-1", 2, 8, "046d", "c31c"))
    assert not rule.matches(elsewhere)
    assert rule_for(STICK).matches(UsbDevice("2-4", 2, 9, "0951", "1666", "A1"))


@pytest.mark.parametrize(
    ("address", "found"),
    [("1-2", STICK), ("0951:1666:B2", TWIN), ("046d:c31c", PLAIN), ("046D:C31C", PLAIN), ("1-3", HUB)],
)
def test_a_device_is_named_by_port_or_ids(address: str, found: UsbDevice) -> None:
    assert choose_device(address, DESK) is found


def test_an_address_of_two_devices_names_them_both() -> None:
    with pytest.raises(BadRequest) as caught:
        choose_device("0951:1666", DESK)
    assert "1-2 (0951:1666:A1), 1-3.1 (0951:1666:B2)" in caught.value.message
    assert choose_device("0951:1666", DESK, [TWIN]) is TWIN


def test_a_serial_number_may_have_colons_in_it() -> None:
    assert parse_ids("0951:1666:a:b") == UsbRule("0951", "1666", "a:b")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "9-9",
        "0951:1667",
        "951:1666",
        "0951:1666:",
        "0951:1666:\x1b[2J",
        "../1-2",
        "1-2:1.0",
        "0951:1666:é",
    ],
)
def test_what_names_no_device_is_refused(address: str) -> None:
    with pytest.raises(BadRequest) as caught:
        choose_device(address, DESK)
    assert "\x1b" not in caught.value.text
