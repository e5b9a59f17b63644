"""Storage with KVM under each VMM but QEMU (its is in tests/e2e): an overlay that leaves nothing, disks that
are made, mounted, kept and grown, shared directories, a qcow2 header of the guest's own, a disposable.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from .conftest import FOREIGN, require_program

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Host

NAME = "store"
CONFIG = """\
memory = 512
start_timeout = 900
root_overlay = { size = "1G" }
persist = ["/var/lib/kept"]
persist_size = "32M"
shared_home = true
shared_directories = [
    { path = "/srv/desk", id = "desk" },
    { path = "/srv/books", id = "books", readonly = true, cache = "always" },
]

[[additional_disks]]
path = "/var/lib/vmsilo/disks/data.img"
id = "data"
create = { size = "32M" }
mount = "/data"

[[additional_disks]]
path = "/var/lib/vmsilo/disks/bare.img"
id = "bare"
create = { size = "16M", filesystem = "none" }
"""
SETUP = """
mkdir -p /srv/desk /srv/books && echo a book > /srv/books/book
chown -R user:user /srv/desk /srv/books
"""
HEADER = r"QFI\373\0\0\0\3\0\0\0\0\0\0\2\0\0\0\0\13"


@pytest.fixture(params=FOREIGN)
def store(request: pytest.FixtureRequest, host: Host) -> Iterator[Host]:
    binary, vmm = FOREIGN[request.param]
    require_program(binary)
    host.run(SETUP)
    with host.vm(NAME, vmm + CONFIG):
        yield host
    host.run(f"vmsilo disk remove {NAME} persist", check=False)
    host.run(f"rm -rf /srv/desk /srv/books /shared/{NAME} /var/lib/vmsilo/disks/*.img")
    assert not host.read("pgrep virtiofsd", check=False)


def in_guest(host: Host, script: str, *, check: bool = True) -> str:
    done = host.vm_run(NAME, "sh", "-c", script, check=check)
    return done.stdout if check else done.stdout + done.stderr


def as_root(host: Host, script: str) -> str:
    done = host.run(f"vm-run --root {NAME} sh -c '{script}'")
    return done.stdout


def test_two_lives(store: Host) -> None:
    """What the first leaves, how its disks and shares are, and what the second finds after kill -9."""
    host = store
    found = as_root(host, "findmnt -no FSTYPE /; findmnt -no SOURCE,OPTIONS /data; stat -c %U /data")
    assert found.startswith("overlay\n/dev/vd")
    assert found.endswith("\nuser\n")
    as_root(
        host,
        "for i in $(seq 5000); do echo RESIDUE-$((40 + 2)); done > /root/left;"
        " echo kept > /var/lib/kept/file",
    )
    in_guest(host, "echo mine > /data/file; echo home > ~/new; echo desk > /mnt/desk/new; sync")
    assert host.read(f"stat -c %U:%G /shared/{NAME}/new /srv/desk/new").split() == ["user:user"] * 2
    assert in_guest(host, "cat /mnt/books/book") == "a book\n"
    assert "Read-only" in in_guest(host, "echo x > /mnt/books/new", check=False)

    before = int(as_root(host, "df --output=size -k /data | tail -1"))
    host.run(f"vmsilo disk grow {NAME} data 64M", user="user")
    assert int(as_root(host, "blockdev --getsize64 /dev/disk/by-id/virtio-data")) == 64 << 20
    deadline = time.monotonic() + 60
    while int(as_root(host, "df --output=size -k /data | tail -1")) < before * 1.6:
        assert time.monotonic() < deadline
        time.sleep(1)

    main = host.main_pid(NAME)
    host.run(f"kill -9 {main}")
    host.wait_until(f"! systemctl is-active -q vmsilo-{NAME}-vm.service")
    host.wait_until(f"test ! -e /run/vmsilo/state/{NAME}.json")
    host.wait_until("! pgrep virtiofsd")
    assert not host.read("grep -rlF RESIDUE-42 /var/lib/vmsilo --exclude-dir=images", check=False)

    assert as_root(host, "ls /root; cat /var/lib/kept/file") == "kept\n"
    assert in_guest(host, "cat /data/file ~/new /mnt/desk/new") == "mine\nhome\ndesk\n"
    rows = {row["Id"]: row for row in json.loads(host.read(f"vmsilo disk list --json {NAME}", user="user"))}
    assert rows["data"]["Size"] == 64 << 20
    assert rows["overlay"]["Path"] == ""

    as_root(host, f'printf "{HEADER}" | dd of=/dev/disk/by-id/virtio-bare conv=notrunc,fsync status=none')
    host.run(f"vm-stop {NAME}", user="user")
    refused = host.run(f"vm-start {NAME}", user="user", check=False)
    assert refused.returncode == 1
    assert "begins like a qcow2 image" in refused.stderr


@pytest.mark.parametrize("vmm", FOREIGN)
def test_a_disposable_with_the_working_directory(host: Host, vmm: str) -> None:
    binary, line = FOREIGN[vmm]
    require_program(binary)
    host.run("mkdir -p /srv/here && echo before > /srv/here/file && chown -R user:user /srv/here")
    with host.vm("pattern", f"{line}memory = 512\nstart_timeout = 900\n"):
        script = "hostname; pwd; id -u; cat file; echo after > file; ip -o link | wc -l"
        command = f"cd /srv/here && vm-run --here --template pattern sh -c '{script}'"
        name, *lines = host.read(command, user="user", timeout=1200).splitlines()
        assert name != "pattern"
        assert lines == ["/srv/here", "1000", "before", "1"]
        assert host.read("cat /srv/here/file") == "after"
        host.wait_until(f"test ! -e /run/vmsilo/vm/{name} && ! vmsilo list | grep -q {name}", seconds=120)
        assert not host.read(f"systemctl list-units --all --plain --no-legend '*{name}*'")
        assert not host.read("pgrep virtiofsd", check=False)
    host.run("rm -r /srv/here")
