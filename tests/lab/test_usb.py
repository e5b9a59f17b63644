"""Host USB devices in VMs, for real: the lab's xHCI controller with a stick and a tablet.

A replug is made by the kernel itself: the driver of the controller is unbound and bound again, and
everything on it comes with new numbers.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lab.conftest import require_program

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.conftest import Host

STICK = "46f4:0001:VMSILO-STICK-1"
SERIAL = "VMSILO-STICK-1"
# Debian's cloud kernel, that of the image `default`, has no USB.
SHAPE = 'image = "hardware"\nmemory = 768\nstart_timeout = 900\n'
XHCI = Path("/sys/bus/pci/drivers/xhci_hcd")


def devices(host: Host) -> dict[str, dict[str, Any]]:
    """By serial number."""
    return {entry["Serial"]: entry for entry in json.loads(host.read("vmsilo usb list --json"))}


def stick(host: Host) -> dict[str, Any]:
    return devices(host)[SERIAL]


def in_guest(host: Host, name: str) -> bool:
    seen = host.vm_run(name, "sh", "-c", "cat /sys/bus/usb/devices/*/serial; true").stdout  # one may just go
    return SERIAL in seen.split()


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.5)


def replug(host: Host) -> None:
    """Bind the controller's driver anew: everything on it goes, and comes with new numbers."""
    (controller,) = [path.name for path in XHCI.glob("0000:*")]
    host.run(f"echo {controller} > {XHCI}/unbind; echo {controller} > {XHCI}/bind", timeout=60)
    wait_for(lambda: SERIAL in devices(host))


def release(host: Host) -> None:
    """Back to the host, so that the next test finds it as the first did: what a running VM has had is given
    back by a replug only.
    """
    refused = host.run(f"vmsilo usb release {STICK}", check=False)
    assert refused.returncode == 1
    assert "could still use it" in refused.stderr
    replug(host)
    wait_for(lambda: stick(host)["HostDrivers"] == ["usb-storage"])


@pytest.fixture(scope="module", params=["qemu", "crosvm"])
def vmm(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    require_program({"qemu": "qemu-system-x86_64"}.get(name, name))
    return name


@pytest.fixture(scope="module")
def vm(host: Host, vmm: str) -> Iterator[str]:
    name = f"usb-{vmm}"
    with host.vm(name, f'{SHAPE}vmm = "{vmm}"\nusb = true\n'):
        host.run(f"vm-start --wait {name}", timeout=1000)
        yield name


def attach(host: Host, name: str) -> None:
    done = host.run(f"vmsilo usb attach {name} {STICK}", check=False)
    if "was built without it" in done.stderr:
        pytest.skip("this crosvm was built without USB")
    assert done.returncode == 0, done.stderr


def test_a_rule_attaches_it(host: Host, vm: str, vmm: str) -> None:
    """Written and taken away while the VM runs, which has a controller."""
    host.define(vm, f'{SHAPE}vmm = "{vmm}"\nusb_devices = ["{STICK}"]\n')
    wait_for(lambda: stick(host)["Vm"] == vm)
    assert host.vms()[vm]["RestartNeeded"] is False
    wait_for(lambda: in_guest(host, vm))
    host.run(f"vmsilo usb detach {STICK}")
    host.define(vm, f'{SHAPE}vmm = "{vmm}"\nusb = true\n')
    release(host)


def test_a_stick_goes_into_the_guest_and_out_again(host: Host, vm: str) -> None:
    assert stick(host)["HostDrivers"] == ["usb-storage"]
    attach(host, vm)
    wait_for(lambda: in_guest(host, vm))
    assert stick(host)["Vm"] == vm
    assert stick(host)["HostDrivers"] == []
    host.run("! ls /dev/sda")
    wait_for(lambda: "sda" in host.vm_run(vm, "ls", "/sys/block").stdout)
    host.run(f"vmsilo usb detach {STICK}")
    wait_for(lambda: not in_guest(host, vm))
    assert stick(host) | {"Vm": "", "HostDrivers": []} == stick(host)
    release(host)
    host.wait_until("test -b /dev/sda")


def test_it_comes_back_after_a_replug(host: Host, vm: str) -> None:
    attach(host, vm)
    wait_for(lambda: in_guest(host, vm))
    replug(host)
    wait_for(lambda: stick(host)["Vm"] == vm)
    wait_for(lambda: in_guest(host, vm))
    tablet = next(entry for serial, entry in devices(host).items() if serial != SERIAL)
    assert tablet["Vm"] == ""
    host.run(f"vmsilo usb detach {vm} {STICK}")
    replug(host)
    time.sleep(3)
    assert stick(host)["Vm"] == ""
    assert stick(host)["HostDrivers"] == ["usb-storage"]


def test_vmsilod_may_be_killed_while_a_guest_has_it(host: Host, vm: str) -> None:
    attach(host, vm)
    host.run("systemctl kill -s KILL vmsilod.service")
    host.wait_until("vmsilo list", seconds=300)
    assert stick(host)["Vm"] == vm
    assert in_guest(host, vm)
    host.run(f"vmsilo usb detach {STICK}")
    release(host)


def test_a_mounted_stick_stays(host: Host, vm: str) -> None:
    host.wait_until("test -b /dev/sda")
    host.run("mkfs.ext4 -qF /dev/sda && mkdir -p /mnt/stick && mount /dev/sda /mnt/stick")
    try:
        refused = host.run(f"vmsilo usb attach {vm} {STICK}", check=False)
        assert refused.returncode == 1
        assert "it is mounted on /mnt/stick" in refused.stderr
        assert stick(host)["HostDrivers"] == ["usb-storage"]
        assert "mounted on /mnt/stick" in host.read("vmsilo usb list")
    finally:
        host.run("umount /mnt/stick")
    attach(host, vm)
    host.run(f"vmsilo usb detach {STICK}")
    release(host)


def test_a_vm_without_a_controller_says_what_to_do(host: Host, vmm: str) -> None:
    with host.vm("usb-none", f'memory = 512\nvmm = "{vmm}"\n') as name:
        host.run(f"vm-start {name}")
        refused = host.run(f"vmsilo usb attach {name} {STICK}", check=False)
        assert refused.returncode == 1
        assert "set usb = true" in refused.stderr


def test_the_end_of_the_vm_leaves_it_to_nobody(host: Host, vm: str) -> None:
    attach(host, vm)
    wait_for(lambda: in_guest(host, vm))
    host.run(f"vm-stop --force {vm}")
    wait_for(lambda: stick(host)["Vm"] == "")
    assert stick(host)["HostDrivers"] == []
    host.run(f"vmsilo usb release {STICK}")
    wait_for(lambda: stick(host)["HostDrivers"] == ["usb-storage"])
