"""Host USB devices over QMP, against a real stream socket."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from qmp_server import QmpServer
from vmsilod.vmm.errors import MonitorRefused, MonitorTimeout
from vmsilod.vmm.monitor import AttachedUsb, UsbMonitor
from vmsilod.vmm.qmp import QemuMonitor

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "monitor.sock"


def attach(path: Path, label: str) -> str:
    null = os.open("/dev/null", os.O_RDWR)
    try:
        return QemuMonitor(path).attach_usb(null, label)
    finally:
        os.close(null)


@pytest.mark.parametrize("late", [False, True])
def test_a_device_comes_and_goes(path: Path, *, late: bool) -> None:
    with QmpServer(path, late=late) as qemu:
        monitor: UsbMonitor = QemuMonitor(path)
        handle = attach(path, "1-5")
        assert qemu.devices == {handle: "/dev/null"}
        assert monitor.list_usb() == [AttachedUsb(handle, label="1-5")]
        monitor.detach_usb(handle)
        assert monitor.list_usb() == []
        monitor.detach_usb(handle)


def test_a_refused_device_leaves_no_descriptor_in_qemu(path: Path) -> None:
    with QmpServer(path, refuse="device_add") as qemu:
        with pytest.raises(MonitorRefused, match="failed to open") as caught:
            attach(path, "1-5")
        assert "\x1b" not in caught.value.message
        assert not qemu.fdsets


def test_two_of_one_name_are_not_two_devices(path: Path) -> None:
    with QmpServer(path) as qemu:
        attach(path, "1-5")
        with pytest.raises(MonitorRefused, match="Duplicate"):
            attach(path, "1-5")
        assert len(qemu.devices) == 1


def test_a_removal_that_is_never_reported_ends_with_a_timeout(path: Path) -> None:
    with QmpServer(path, silent=True):
        handle = attach(path, "1-5")
        with pytest.raises(MonitorTimeout):
            QemuMonitor(path, timeout=0.2).detach_usb(handle)
