"""What every VMM's control client can do, whatever its protocol.

Implemented by crosvm_control.CrosvmMonitor, qmp.QemuMonitor and
cloud_hypervisor_api.CloudHypervisorMonitor, made by drivers.Driver.open_monitor. A client is a path and a
timeout: it connects anew for each request and holds nothing between two, so it needs no close. It blocks:
call it in the worker pool, never on a loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from vmsilod.vmm.launch import NetDevice

DEFAULT_TIMEOUT = 5.0
"""Seconds for one request, connecting included."""


@dataclass(frozen=True)
class BalloonState:
    """Bytes. The guest's figures are what it last reported, and None where it has not (they are its word,
    not a fact).
    """

    balloon: int
    guest_total: int | None = None
    guest_free: int | None = None
    guest_available: int | None = None


@dataclass(frozen=True)
class DiskPlace:
    """Which of a VM's virtio disks: its serial number, and how many come before it in the argv."""

    serial: str
    index: int


@dataclass(frozen=True)
class MemoryState:
    """Bytes. `requested` is what the guest is asked to use, `actual` what it has plugged in, `maximum` what
    it could.
    """

    requested: int
    actual: int
    maximum: int


class MonitorClient(Protocol):
    """Every method raises a MonitorError, and returns when the VMM has taken the request (not when it is
    carried out).
    """

    def power_button(self) -> None:
        """Presses the ACPI power button; the guest decides what it does then."""

    def stop(self) -> None:
        """Ends the VMM at once; the guest is not told."""

    def suspend(self) -> None:
        """Stops the vCPUs."""

    def resume(self) -> None:
        """Lets the vCPUs run again."""

    def set_balloon(self, size: int) -> None:
        """Asks the guest to give up `size` bytes."""

    def balloon_state(self) -> BalloonState: ...

    def resize_memory(self, size: int) -> None:
        """Asks the guest to plug memory in or out until it has `size` bytes in all."""

    def memory_state(self) -> MemoryState: ...

    def resize_disk(self, place: DiskPlace, size: int) -> None:
        """A disk grows to `size` bytes, its file too, and the guest is told."""

    def attach_net(self, net: NetDevice) -> None:
        """Plugs a network interface in; its descriptors stay the caller's."""

    def detach_net(self, device: str) -> None:
        """Returns when the VMM has let go of the interface of this NetDevice.id; one that is not there is no
        error. A guest that does not give it up makes it a MonitorTimeout: take the TAP down then.
        """


@dataclass(frozen=True)
class AttachedUsb:
    """`handle` is the VMM's name for it. `label` is what it was attached under, `ids` its "VID:PID", each ""
    where the VMM does not say.
    """

    handle: str
    label: str = ""
    ids: str = ""


@runtime_checkable
class UsbMonitor(Protocol):
    """What the client of a VMM that takes USB devices while it runs can do beside."""

    returns_usb_to_host: bool
    """Whether the VMM binds the host's drivers again when it lets go of a device, if its descriptor
    allows.
    """

    def attach_usb(self, fd: int, label: str) -> str:
        """Plugs the device of this usbfs descriptor in, which stays the caller's; returns its handle. A
        label has letters, digits and dashes.
        """

    def detach_usb(self, handle: str) -> None:
        """Returns when the VMM has let go of it; a handle that is not there any more is no error."""

    def list_usb(self) -> list[AttachedUsb]: ...
