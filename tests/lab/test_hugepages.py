"""Images in huge pages under each VMM with KVM: what the root is in the guest, that VMs share one copy, that
no guest changes it, and what is left.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab.conftest import require_program

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.conftest import Host

PLACE = Path("/run/vmsilo/hugepages")
SYSFS = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
TABLE = (
    'memory = 512\nstart_timeout = 600\nimage = {{hugepages = true, keep = 0, device = "{device}"}}\n{vmm}\n'
)
# QEMU's disk in huge pages is seen in the container host.
WAYS = {
    "qemu-pmem": ("qemu-system-x86_64", 'vmm = "qemu"', "auto", "/dev/pmem0"),
    "crosvm": ("crosvm", 'vmm = "crosvm"', "auto", "/dev/vda"),
    "cloud-hypervisor-pmem": ("cloud-hypervisor", 'vmm = "cloud-hypervisor"', "auto", "/dev/pmem0"),
    "cloud-hypervisor-disk": ("cloud-hypervisor", 'vmm = "cloud-hypervisor"', "disk", "/dev/vda"),
}


def count_pages() -> int:
    return int((SYSFS / "nr_hugepages").read_text())


@pytest.fixture(params=WAYS)
def silo(request: pytest.FixtureRequest, host: Host) -> Iterator[tuple[str, str]]:
    """A running VM and the device that its root is."""
    binary, vmm, device, root = WAYS[request.param]
    require_program(binary)
    before = count_pages()
    with host.vm("huge", TABLE.format(device=device, vmm=vmm)) as name:
        host.vm_run(name, "true")
        yield name, root
    assert count_pages() == before
    assert not list(PLACE.iterdir())


def test_guest_boots_from_the_shared_copy_and_cannot_change_it(host: Host, silo: tuple[str, str]) -> None:
    name, device = silo
    assert f"vmsilo-init: root {device} (erofs, ro)" in host.run(f"vm-run --root {name} dmesg").stdout
    (copy,) = PLACE.iterdir()
    assert host.run(f"find /proc/{host.main_pid(name)}/fd -lname {copy}").stdout
    spoil = f"head -c 4096 /dev/urandom | dd of={device} bs=4096 seek=3 conv=notrunc,fsync"
    # Under cloud-hypervisor this hangs the guest: its mapping is private, and a copy has no huge page left.
    host.run(f"timeout -s KILL 40 vm-run --root {name} sh -c '{spoil}'", check=False)
    host.run(f"cmp {copy} /var/lib/vmsilo/images/default/current/root.erofs")


def test_crosvm_has_persistent_memory_of_an_ordinary_file(host: Host) -> None:
    require_program("crosvm")
    text = 'vmm = "crosvm"\nmemory = 512\nstart_timeout = 600\nimage = {device = "pmem"}\n'
    with host.vm("place", text) as name:
        host.vm_run(name, "true")
        assert "vmsilo-init: root /dev/pmem0 (erofs, ro)" in host.run(f"vm-run --root {name} dmesg").stdout
