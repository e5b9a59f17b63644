"""PCI passthrough with a real sysfs, IOMMU and VFIO: the spare e1000e goes to a VM, the chipset does not.

The lab's emulated IOMMU does not remap interrupts, which VFIO and vmsilo refuse until the risk is accepted.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .conftest import CONFIG, Host, require_program, write

if TYPE_CHECKING:
    from collections.abc import Iterator

NIC = "0000:00:11.0"
DISK = "0000:00:02.0"
SMBUS = "0000:00:1f.3"
ACCEPTED = Path("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts")
BINDINGS = (
    "cd /sys/bus/pci/devices && for d in *; do echo $d $(readlink $d/driver) $(cat $d/driver_override); done"
)
GLOBAL = Path("/etc/vmsilo/vmsilo.toml")
MODPROBE = Path("/etc/modprobe.d/lab-vfio.conf")
ISOLATED = 'isolated_pci_devices = ["00:11.0"]\n'
VM = 'memory = 512\nimage = "hardware"\nvmm = "{vmm}"\npci_devices = [{devices}]\n'


def vm_with(devices: str, vmm: str = "qemu") -> str:
    return VM.format(devices=devices, vmm=vmm)


def find_device(host: Host, address: str = NIC) -> dict[str, Any]:
    (found,) = (row for row in json.loads(host.read("vmsilo pci list --json")) if row["Address"] == address)
    return dict(found)


def find_group(host: Host) -> Path:
    return Path(f"/dev/vfio/{find_device(host)['Group']}")


@pytest.fixture
def vfio(host: Host) -> Iterator[None]:
    """VFIO, with its risk here accepted; after it the spare NIC is with the host again."""
    host.run("modprobe vfio_iommu_type1")
    ACCEPTED.write_text("Y\n")
    yield
    host.run(f"vmsilo pci release {NIC}", check=False)


def test_the_host_shows_its_devices(host: Host) -> None:
    nic, disk = find_device(host), find_device(host, DISK)
    assert (nic["Driver"], nic["State"], nic["Class"]) == ("e1000e", "host", "0200")
    assert "82574L" in nic["Name"] or "8086:10d3" in nic["Name"]
    assert "vda is mounted on /" in disk["Note"]
    assert "default route" in find_device(host, "0000:00:10.0")["Note"]


REFUSED = {
    "shared-group": (
        f'"{SMBUS}"',
        ("shares IOMMU group", "0000:00:1f.0 (", "0000:00:1f.2 (", "driver ahci"),
    ),
    "mounted-disk": (f'"{DISK}"', ("is in use by this host: vda is mounted on /",)),
    "default-route": ('"00:10.0"', ("has the default route",)),
    "absent": ('"00:1d.0"', ("there is no PCI device 0000:00:1d.0",)),
    "no-reset": (f'"{SMBUS}", "00:1f.0", "00:1f.2"', ("cannot be reset",)),
}


@pytest.fixture(scope="module")
def refused(host: Host) -> Iterator[None]:
    """All in one reading of the configuration: each takes seconds in an emulated lab."""
    files = {CONFIG / f"lab-{case}.toml": vm_with(devices) for case, (devices, _) in REFUSED.items()}
    for path, text in files.items():
        write(path, text)
    host.reload()
    yield
    for path in files:
        path.unlink()
    host.reload()


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_changed(host: Host, vfio: None, refused: None, case: str) -> None:
    before = host.read(BINDINGS)
    done = host.run(f"vm-start lab-{case}", check=False)
    assert done.returncode == 1
    for fact in REFUSED[case][1]:
        assert fact in done.stderr
    assert host.read(BINDINGS) == before


def test_interrupts_that_a_device_could_forge(host: Host, vfio: None) -> None:
    ACCEPTED.write_text("N\n")
    with host.vm("lab-nic", vm_with('"00:11.0"')):
        done = host.run("vm-start lab-nic", check=False)
        assert "does not remap interrupts" in done.stderr
        assert "allow_unsafe_interrupts=1" in done.stderr
    assert find_device(host)["Driver"] == "e1000e"


@pytest.mark.parametrize("vmm", ["qemu", "crosvm"])
def test_a_vm_has_the_nic_until_it_ends(host: Host, vfio: None, vmm: str) -> None:
    """This one ends while there is no vmsilod; that of the next boot (below) is stopped."""
    if vmm != "qemu":
        require_program(vmm)
    other = vm_with(f'"{NIC}"')
    with host.vm("lab-nic", vm_with('"00:11.0"', vmm)), host.vm("lab-other", other):
        host.run("vm-start --wait lab-nic")
        guest = host.vm_run("lab-nic", "sh", "-c", "ip -d link; cat /sys/class/net/*/device/device").stdout
        assert "52:54:00:00:00:02" in guest
        assert "0x10d3" in guest
        uid = int(host.read(f"stat -c %u /proc/{host.main_pid('lab-nic')}"))
        assert uid >= 61184, "a dynamic user's"
        status = host.read(f"cat /proc/{host.main_pid('lab-nic')}/status")
        assert "CapEff:\t0000000000000000" in status
        assert find_group(host).stat().st_uid == uid
        device = find_device(host)
        assert (device["State"], device["Vm"], device["Driver"]) == ("used", "lab-nic", "vfio-pci")
        refused = host.run("vm-start lab-other", check=False)
        assert "is used by VM 'lab-nic'" in refused.stderr
        assert "is used by VM" in host.run(f"vmsilo pci release {NIC}", check=False).stderr
        end_without_vmsilod(host, "lab-nic")
        device = find_device(host)
        assert (device["State"], device["Driver"]) == ("claimed", "vfio-pci")
        assert find_group(host).stat().st_uid == 0
    assert host.read(f"vmsilo pci release {NIC}").endswith("driver e1000e")
    assert find_device(host)["State"] == "host"


def end_without_vmsilod(host: Host, name: str) -> None:
    """A vmsilod that was killed keeps the books; of a VM that ends while there is none, the next one takes
    the device back.
    """
    pid = host.main_pid(name)
    host.run("systemctl kill --kill-whom=main -s KILL vmsilod")
    host.wait_until("vmsilo pci list")
    assert find_device(host)["Vm"] == name
    assert host.main_pid(name) == pid
    host.run("systemctl stop vmsilod.service vmsilod.socket")
    host.run(f"kill -{signal.SIGKILL.value} {pid}")
    host.wait_until(f"! systemctl is-active -q vmsilo-{name}-vm.service")
    host.run("systemctl start vmsilod.socket vmsilod.service")


def test_claim_and_release_by_the_owner(host: Host, vfio: None) -> None:
    host.run("vmsilo pci claim 00:11.0", user="user")
    assert (find_device(host)["State"], find_device(host)["Note"]) == ("claimed", "was with e1000e")
    refused = host.run(f"vmsilo pci claim {DISK}", user="user", check=False)
    assert "vda is mounted on /" in refused.stderr
    host.run("vmsilo pci release 00:11.0", user="user")
    assert find_device(host)["Driver"] == "e1000e"
    denied = host.run("vmsilo pci claim 00:11.0", user="nobody", check=False)
    assert denied.returncode == 1
    assert find_device(host)["Driver"] == "e1000e"


def test_a_configured_isolation_takes_the_device_at_once_and_at_boot(host: Host, vfio: None) -> None:
    settings = GLOBAL.read_text()
    try:
        write(GLOBAL, f"{settings}{ISOLATED}")
        host.reload()
        device = find_device(host)
        assert (device["State"], device["Isolated"]) == ("claimed", True)
        assert "initramfs" in host.run("vmsilo check").stdout, "the one of this boot knows no list"
        host.run(f"vmsilo pci release {NIC}")
        host.reload()
        assert find_device(host)["Driver"] == "e1000e", "released by a person, for this boot"
    finally:
        write(GLOBAL, settings)
        host.reload()


def test_an_initramfs_knows_the_isolated_devices(host: Host) -> None:
    require_program("update-initramfs")
    settings = GLOBAL.read_text()
    tree = "/var/tmp/initramfs"
    try:
        write(GLOBAL, f"{settings}{ISOLATED}")
        host.run(f"mkinitramfs -o {tree}.img && unmkinitramfs {tree}.img {tree}")
        rules = host.read(f"find {tree} -name 40-vmsilo-pci.rules -exec cat {{}} +")
        assert f'ATTR{{[pci/{NIC}]driver_override}}="vfio-pci"' in rules
        assert host.read(f"find {tree} -name 'vfio-pci.ko*'")
        assert (
            host.read(f"grep -rh softdep {tree} --include vmsilo-pci.conf") == "softdep e1000e pre: vfio-pci"
        )
        assert "initramfs" not in host.run("vmsilo check").stdout
    finally:
        write(GLOBAL, settings)
        host.run(f"rm -rf {tree} {tree}.img; mkinitramfs -o {tree}.img && rm {tree}.img")
    assert not list(Path("/var/lib/vmsilo/initramfs").glob("*"))


@pytest.mark.leaving
def test_a_device_is_isolated_for_the_next_boot(host: Host) -> None:
    write(GLOBAL, f"{GLOBAL.read_text()}{ISOLATED}")
    MODPROBE.write_text("options vfio_iommu_type1 allow_unsafe_interrupts=1\n")
    write(CONFIG / "lab-nic.toml", vm_with('"00:11.0"'))


@pytest.mark.second
def test_no_driver_of_the_host_has_had_an_isolated_device(host: Host) -> None:
    device = find_device(host)
    assert (device["Driver"], device["State"], device["Isolated"]) == ("vfio-pci", "claimed", True)
    assert host.read("systemctl show -P Result vmsilo-pci-claim.service") == "success"
    kernel = host.read("journalctl -b -k -q --no-pager -o cat")
    assert "e1000e 0000:00:10.0" in kernel
    assert f"e1000e {NIC}" not in kernel
    host.run("vm-start lab-nic")
    assert find_device(host)["State"] == "used"
    host.run("vm-stop --force lab-nic")
    device = find_device(host)
    assert (device["State"], device["Driver"]) == ("claimed", "vfio-pci")
    assert find_group(host).stat().st_uid == 0
    MODPROBE.unlink()
    write(GLOBAL, GLOBAL.read_text().replace(ISOLATED, ""))
    host.remove("lab-nic")
    assert host.read(f"vmsilo pci release {NIC}").endswith("driver e1000e")
