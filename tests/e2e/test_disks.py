"""Disks in a real guest: an overlay that leaves nothing, disks that are made, mounted, kept and grown, paths
of the root that outlast it, and a guest that writes itself a qcow2 header. On PCI; the disks of other tests
are a microvm's.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.container import Container

VM = "disks"
DATA = "/var/lib/vmsilo/disks/data.img"
CONFIG = f"""
memory = 768
root_overlay = {{ size = "2G" }}
persist = ["/etc/ssh", "/etc/kept.conf", "/var/lib/kept", "/etc/ssh/sub"]
persist_size = "64M"
qemu.machine = "q35"

[[additional_disks]]
path = "{DATA}"
id = "data"
create = {{ size = "64M" }}
mount = "/data"

[[additional_disks]]
path = "/var/lib/vmsilo/disks/bare.img"
id = "bare"
create = {{ size = "16M", filesystem = "none" }}
"""
HEADER = r"QFI\373\0\0\0\3\0\0\0\0\0\0\2\0\0\0\0\13"


@pytest.fixture(scope="module")
def guest(host: Container) -> Iterator[Container]:
    host.write(f"/etc/vmsilo/vms.d/{VM}.toml", CONFIG)
    host.wait_until(f"test -S /run/vmsilo/{VM}-command.socket")
    yield host
    host.run(f"vm-stop --force {VM}; rm /etc/vmsilo/vms.d/{VM}.toml", check=False)
    host.wait_until(f"test ! -e /run/systemd/system/vmsilo-{VM}.socket")
    host.run(f"vmsilo disk remove {VM} persist; rm -f /var/lib/vmsilo/disks/*", check=False)


def in_guest(host: Container, script: str, *, check: bool = True) -> str:
    done = host.run(["vm-run", "--root", VM, "sh", "-c", script], user="user", check=check)
    return str(done.stdout)


def disks_of(host: Container) -> dict[str, dict[str, Any]]:
    listed = json.loads(host.run(["vmsilo", "disk", "list", "--json", VM], user="user").stdout)
    return {disk["Id"]: disk for disk in listed}


def vmm_of(host: Container) -> int:
    return int(host.run(f"systemctl show -P MainPID vmsilo-{VM}-vm.service").stdout)


def test_disks_of_one_life(guest: Container) -> None:
    """What the root takes is on a disk without a name, and gone after kill -9; the rest is there again."""
    found = in_guest(
        guest, "findmnt -no FSTYPE /; cat /sys/block/vdb/serial; echo; findmnt -no OPTIONS /data"
    )
    assert found.startswith("overlay\nvmsilo-crypt\n")
    assert "rw" in found
    assert in_guest(guest, "stat -c %U /data").strip() == "user"
    guest.run(["vm-run", VM, "sh", "-c", "echo mine >/data/file"], user="user")
    in_guest(
        guest,
        "cd /etc/ssh && echo kept >marker && echo kept >/var/lib/kept/file && echo a >/etc/kept.conf/f",
    )
    ssh = in_guest(guest, "ls /etc/ssh").split()
    assert {"marker", "sub", "sshd_config"} <= set(ssh)

    # A marker that stands nowhere but on the overlay, behind a key that only the guest has.
    in_guest(guest, "for i in $(seq 200000); do echo RESIDUE-$((40 + 2)); done >/root/left; sync")
    assert " crypt aes-xts-plain64 " in in_guest(guest, "dmsetup table vmsilo-overlay")
    journal = guest.run(f"journalctl -q -o cat -u vmsilo-{VM}-vm.service").stdout
    assert "is on the host's disk as it is" not in journal
    vmm = vmm_of(guest)
    held = guest.run(f"ls -l /proc/{vmm}/fd").stdout
    assert "/var/lib/vmsilo/overlays/#" in held
    assert "(deleted)" in held
    fd, _, overlay = next(line.split()[8:11] for line in held.splitlines() if "/vmsilo/overlays/#" in line)
    assert int(guest.run(f"stat -L -c %b /proc/{vmm}/fd/{fd}").stdout) * 512 > 200000 * len("RESIDUE-42\n")
    assert guest.run(f"grep -acF RESIDUE-42 /proc/{vmm}/fd/{fd}", check=False).stdout == "0\n"
    assert guest.run(f"blkid -p /proc/{vmm}/fd/{fd}", check=False).stdout == ""
    assert guest.run("find /var/lib/vmsilo/overlays -mindepth 1").stdout == ""
    guest.run(f"kill -9 {vmm}")
    guest.wait_until(f"! systemctl is-active -q vmsilo-{VM}-vm.service")
    guest.wait_until(f"test ! -e /run/vmsilo/state/{VM}.json")
    assert not guest.run("grep -rlF RESIDUE-42 /var/lib/vmsilo --exclude-dir=images", check=False).stdout
    open_files = guest.run("ls -l /proc/[0-9]*/fd 2>/dev/null | grep vmsilo/overlays", check=False).stdout
    assert overlay not in open_files  # those of other VMs may be there

    started = in_guest(
        guest, "ls /root/left; cat /data/file /etc/ssh/marker /var/lib/kept/file; cat /etc/kept.conf/f"
    )
    assert started == "mine\nkept\nkept\na\n"


def test_a_guest_that_reboots_begins_anew(guest: Container) -> None:
    in_guest(guest, "echo old >/root/left; sync")
    pid = vmm_of(guest)
    in_guest(guest, "systemctl reboot", check=False)
    guest.wait_until(f"vmsilo status {VM} | grep -q starting", seconds=60)
    assert in_guest(guest, "ls /root; cat /etc/ssh/marker") == "kept\n"
    assert vmm_of(guest) == pid


def test_disk_grows_while_its_guest_runs(guest: Container) -> None:
    before = int(in_guest(guest, "df --output=size -k /data | tail -1"))
    guest.run(["vmsilo", "disk", "grow", VM, "data", "128M"], user="user")
    assert int(in_guest(guest, "blockdev --getsize64 /dev/disk/by-id/virtio-data")) == 128 << 20
    deadline = time.monotonic() + 30
    while int(in_guest(guest, "df --output=size -k /data | tail -1")) < before * 1.6:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert in_guest(guest, "cat /data/file") == "mine\n"
    refused = guest.run(["vmsilo", "disk", "grow", VM, "data", "64M"], user="user", check=False)
    assert refused.returncode == 1
    assert "bytes already" in refused.stderr
    guest.run(["vmsilo", "disk", "grow", VM, "persist", "96M"], user="user")
    disks = disks_of(guest)
    assert disks["data"]["Size"] == 128 << 20
    assert disks["persist"]["Size"] == 96 << 20
    assert disks["data"]["State"] == "in use"
    assert disks["overlay"]["Path"] == ""


def test_a_second_vm_does_not_get_the_disk(guest: Container) -> None:
    in_guest(guest, "true")
    guest.write(
        "/etc/vmsilo/vms.d/thief.toml",
        f'memory = 512\nadditional_disks = [{{ path = "{DATA}", ro = true }}]\n',
    )
    guest.wait_until("test -S /run/vmsilo/thief-command.socket")
    refused = guest.run(["vm-start", "thief"], user="user", check=False)
    assert refused.returncode == 1
    assert f"VM '{VM}', which runs, is writing this disk" in refused.stderr
    guest.run("rm /etc/vmsilo/vms.d/thief.toml")


def test_a_qcow2_header_of_the_guests_own_is_refused(guest: Container) -> None:
    """It names a file of the host, which a VMM that detects formats would open at the next start."""
    in_guest(guest, f"printf '{HEADER}' | dd of=/dev/disk/by-id/virtio-bare conv=notrunc,fsync status=none")
    guest.run(["vm-stop", VM], user="user")
    refused = guest.run(["vm-start", VM], user="user", check=False)
    assert refused.returncode == 1
    assert "disk 'bare'" in refused.stderr
    assert "begins like a qcow2 image" in refused.stderr
    guest.run("rm /var/lib/vmsilo/disks/bare.img")
    assert in_guest(guest, "cat /etc/ssh/marker") == "kept\n"
    assert disks_of(guest)["bare"]["Size"] == 16 << 20
