"""Real guests whose root is in the kernel's huge pages: as a disk, and as persistent memory that is used in
place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from huge_host import FOLDER, drop_plain_image, list_images, make_plain_image, open_sysfs, require_pages
from vmsilod.hugepages import pool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.container import Container

FILE = "/usr/lib/x86_64-linux-gnu/libcrypto.so.3"
READ = f"grep ^Cached: /proc/meminfo; cat {FILE} >/dev/null; grep ^Cached: /proc/meminfo; stat -Lc %s {FILE}"
VMS = {"place": "pmem", "block": "disk"}


@pytest.fixture(scope="module")
def pages(host: Container) -> Iterator[int]:
    """How many the image has; two VMs are configured for it."""
    count = make_plain_image(host)
    before = pool.read_counters().persistent
    try:
        require_pages(count)
        open_sysfs(host)
        for name, device in VMS.items():
            table = f'{{name = "plain", hugepages = true, device = "{device}", keep = 0}}'
            host.write(f"/etc/vmsilo/vms.d/{name}.toml", f"memory = 512\nimage = {table}\n")
            host.wait_until(f"systemctl -q is-active vmsilo-{name}.socket")
            host.run(["vm-start", name, "--wait"], user="user")
        yield count
    finally:
        for name in VMS:
            host.run(f"vm-stop --force {name}; rm -f /etc/vmsilo/vms.d/{name}.toml", check=False)
        drop_plain_image(host)
        found = pool.read_counters().persistent, list_images(host)
        pool.set_persistent(before)  # they are this machine's, not the container's
    assert found == (before, [])


def grown(host: Container, name: str) -> tuple[int, int]:
    """KiB by which the guest's page cache grew when it read a file, and that file's size in KiB."""
    words = host.run(["vm-run", name, "sh", "-c", READ], user="user").stdout.split()
    return int(words[4]) - int(words[1]), int(words[6]) >> 10


def test_root_is_used_in_place_without_a_copy_in_the_guest(host: Container, pages: int) -> None:
    for name, device in (("place", "pmem0"), ("block", "vda")):
        booted = host.run(f"vm-run --root {name} dmesg").stdout
        assert f"vmsilo-init: root /dev/{device} (erofs, ro)" in booted
    (copy,) = list_images(host)
    assert int(host.run(f"stat -c %b {FOLDER}/{copy}").stdout) >> 12 == pages  # blocks of 512 bytes
    more, size = grown(host, "place")
    assert more < size / 4
    # The same copy, to which nothing that a guest writes gets.
    more, size = grown(host, "block")
    assert more > size / 2, "a disk is copied into the guest's page cache, so this is what tells them apart"


def test_no_guest_writes_to_the_copy(host: Container, pages: int) -> None:
    for name, device in (("place", "pmem0"), ("block", "vda")):
        spoil = f"head -c 4096 /dev/urandom | dd of=/dev/{device} bs=4096 seek=3 conv=notrunc,fsync"
        host.run(["vm-run", "--root", name, "sh", "-c", spoil], check=False, timeout=60)
        for vm in VMS:
            pid = host.run(f"systemctl show -P MainPID vmsilo-{vm}-vm").stdout.strip()
            held = host.run(f"find /proc/{pid}/fd -lname '{FOLDER}/*' -printf '%f\\n'").stdout.split()
            assert held
            for fd in held:
                assert host.run(f"grep flags: /proc/{pid}/fdinfo/{fd}").stdout.split()[1][-1] == "0"
    image = "/var/lib/vmsilo/images/plain/current/root.erofs"
    host.run(f"cmp {image} {FOLDER}/plain=*")


def test_last_vm_takes_the_copy_with_it(host: Container, pages: int) -> None:
    host.run("vm-stop --force place")
    assert len(list_images(host)) == 1
    host.run("vm-stop --force block")
    assert list_images(host) == []
