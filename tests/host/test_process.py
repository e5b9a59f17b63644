"""What a VM's processes are and what they can reach."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hosts.standin.site import unit
from image_tree import FIRST

if TYPE_CHECKING:
    from hosts.standin.site import Site

CONNECT = "import socket as s; s.socket(s.AF_UNIX).connect"


def read_status(site: Site, pid: int) -> dict[str, str]:
    lines = site.host.run(["cat", f"/proc/{pid}/status"]).stdout.splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_the_main_process_is_the_vmm_under_a_uid_of_its_own(site: Site) -> None:
    names = [site.running(), site.running()]
    uids = set()
    for name in names:
        pid = site.main_pid(name)
        words = site.host.run(["cat", f"/proc/{pid}/cmdline"]).stdout.split("\0")
        assert "/usr/local/bin/qemu-system-x86_64" in words
        status = read_status(site, pid)
        assert len(set(status["Uid"].split())) == 1
        uids.add(int(status["Uid"].split()[0]))
        assert site.show(name)["Uid"] == int(status["Uid"].split()[0])
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[kind], 16) == 0
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
    assert len(uids) == 2
    assert not uids & {0, 1000, 1001}


def test_the_vmm_gets_the_descriptors_that_its_command_line_names_and_no_other(site: Site) -> None:
    name = site.running()
    text = site.journal_of(name).partition("standin fds: ")[2].partition("\n")[0]
    fds = {int(number): target for number, target in json.loads(text).items()}
    image = f"/var/lib/vmsilo/images/default/{FIRST}"
    assert fds.pop(0) == fds.pop(1)
    assert fds.pop(2).partition(":")[0] == "socket"  # the journal
    passed = sorted(target.partition(":[")[0].partition("#")[0] for target in fds.values())
    assert passed == sorted(
        [
            *(f"{image}/vmlinuz", "/memfd:vmsilo-initrd (deleted)", f"{image}/root.erofs", "socket"),
            "/var/lib/vmsilo/overlays/",  # which has no name there
        ]
    )
    assert sorted(fds) == [3, 4, 5, 6, 7]


def test_the_secret_is_not_for_others_to_see(site: Site) -> None:
    name = site.running()
    secret = site.vm_run(name, "cat", "/tmp/guest/secret").stdout
    assert len(secret) == 64
    pid = site.main_pid(name)
    seen = site.host.run(f"cat /proc/{pid}/cmdline /proc/{pid}/environ /run/vmsilo/state/*.json").stdout
    assert secret not in seen
    for file in ("/run/vmsilo-relay", "/run/vmsilo/state"):
        assert site.host.run(["ls", file], user="user", check=False).returncode != 0


def test_a_vm_cannot_reach_beyond_itself(site: Site) -> None:
    name = site.running()
    other = site.running()
    attempts = (
        "touch /run/vmsilo/x",
        "touch /etc/x",
        "ls /home/user",
        "ls /root",
        f"ls /run/vmsilo/vm/{other}/vsock",
        "ls /run/vmsilo/state",
        f"cat /proc/{site.main_pid(other)}/cmdline",
        f"kill -9 {site.main_pid(other)}",
        "unshare --user true",
        "echo > /dev/kmsg",
        "head -c1 /dev/vda /dev/mem",
        f"python3 -c \"{CONNECT}('/run/vmsilo/vm/{name}/monitor.sock')\"",
        "python3 -c 'import socket as s; s.socket(s.AF_INET)'",
        f"python3 -c \"{CONNECT}('/run/vmsilo/relay.sock')\"",
    )
    for attempt in attempts:
        assert site.vm_run(name, "sh", "-c", attempt).returncode != 0, attempt
    assert site.vm_run(name, "touch", "/tmp/x").returncode == 0  # the shell itself does work there
    assert site.vm_run(other, "ls", "/tmp/x").returncode != 0


def test_the_device_policy_is_closed(site: Site) -> None:
    name = site.running()
    shown = site.unit(name, "DevicePolicy", "DeviceAllow", "PrivateNetwork", "ProtectSystem")
    assert shown == {
        "DevicePolicy": "closed",
        "DeviceAllow": "/dev/kvm rw",
        "PrivateNetwork": "yes",
        "ProtectSystem": "strict",
    }
    assert site.unit(name, "DevicePolicy", suffix="vsock") == {"DevicePolicy": "closed"}


def test_all_processes_of_a_vm_are_in_its_own_units(site: Site) -> None:
    name = site.running()
    uid = site.show(name)["Uid"]
    groups = site.host.run(f"for p in $(pgrep -u {uid}); do cat /proc/$p/cgroup; done").stdout
    paths = {line.rpartition("/")[2] for line in groups.splitlines() if "vmsilo.slice" in line}
    assert paths == {unit(name), unit(name, "vsock")}


def test_the_journal_of_a_vm_says_what_runs_it(site: Site) -> None:
    name = site.running()
    lines = site.host.run(["journalctl", "-q", "-o", "cat", "-u", "vmsilod", "-n", "50"]).stdout
    assert f"VM {name}: guest ready" in lines
    assert (
        "VMs run without hardware virtualisation" in lines
        or site.host.run("test -e /dev/kvm").returncode == 0
    )
