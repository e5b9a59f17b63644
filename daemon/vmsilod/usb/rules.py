"""Which device belongs to which VM: rules of the configuration, and what was attached by hand in this run.

Pure. Called by the attachments with what is plugged in and which VMs run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsilod.errors import BadRequest
from vmsilod.usb.devices import is_port_name, is_serial

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vmsilod.usb.devices import UsbDevice

_IDS = re.compile(r"([0-9a-fA-F]{4}):([0-9a-fA-F]{4})(?::(.*))?")


@dataclass(frozen=True)
class UsbRule:
    """`serial` and `port` are "" where any will do. A port is named only for a device without a serial
    number that was attached by hand: the next one of its kind may be another.
    """

    vendor: str
    product: str
    serial: str = ""
    port: str = ""

    def matches(self, device: UsbDevice) -> bool:
        return (
            (self.vendor, self.product) == (device.vendor, device.product)
            and self.serial in ("", device.serial)
            and self.port in ("", device.name)
        )

    @property
    def is_exact(self) -> bool:
        return bool(self.serial or self.port)

    def __str__(self) -> str:
        ids = f"{self.vendor}:{self.product}" + (f":{self.serial}" if self.serial else "")
        return ids + (f" at {self.port}" if self.port else "")


@dataclass(frozen=True)
class Claim:
    """A running VM's word on devices. `since` orders VMs by their start; `by_hand` is from this run."""

    vm: str
    rule: UsbRule
    since: int = 0
    by_hand: bool = False


def rule_for(device: UsbDevice) -> UsbRule:
    """The rule by which this very device is recognised when it is plugged in again."""
    return UsbRule(device.vendor, device.product, device.serial, "" if device.serial else device.name)


def find_claim(
    device: UsbDevice, claims: Iterable[Claim], refused: Sequence[tuple[str, UsbRule]]
) -> Claim | None:
    """Who gets the device: what was attached by hand comes first, then the more exact rule, then the VM that
    was started first. `refused` are (VM, rule) of devices that were detached by hand.
    """
    if device.is_hub:
        return None
    fitting = [
        claim
        for claim in claims
        if claim.rule.matches(device)
        and not any(vm == claim.vm and rule.matches(device) for vm, rule in refused)
    ]
    return min(
        fitting,
        key=lambda claim: (not claim.by_hand, not claim.rule.is_exact, claim.since, claim.vm),
        default=None,
    )


def choose_device(
    untrusted_address: str, devices: Sequence[UsbDevice], preferred: Sequence[UsbDevice] = ()
) -> UsbDevice:
    """The one device that BUS-PORT, VID:PID or VID:PID:SERIAL names; BadRequest with the candidates else.

    Where several fit, the `preferred` ones among them count.
    """
    if is_port_name(untrusted_address):
        fitting = [device for device in devices if device.name == untrusted_address]
    else:
        rule = parse_ids(untrusted_address)
        fitting = [device for device in devices if rule.matches(device)]
    fitting = [device for device in fitting if device in preferred] or fitting
    if not fitting:
        raise BadRequest(f"no USB device {untrusted_address} is plugged in", "vmsilo usb list")
    if len(fitting) > 1:
        named = ", ".join(f"{device.name} ({device.ids})" for device in fitting)
        raise BadRequest(
            f"{untrusted_address} names {len(fitting)} devices: {named}", "name one by its port"
        )
    return fitting[0]


def parse_ids(untrusted_text: str) -> UsbRule:
    match = _IDS.fullmatch(untrusted_text)
    if match is None or (match[3] is not None and not is_serial(match[3])):
        raise BadRequest(
            "not the address of a USB device", "1-2.3 (bus and ports), 046d:c52b, or 046d:c52b:SERIAL"
        )
    return UsbRule(match[1].lower(), match[2].lower(), match[3] or "")
