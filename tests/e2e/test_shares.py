"""Shared directories with a real virtiofsd and a real guest: who owns what on either side, what is refused,
what is not served, and that nothing is left.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.container import Container

VM = """
memory = 768
shared_home = true
shared_directories = [
    { path = "/srv/desk", id = "desk" },
    { path = "/srv/books and more", mount = "/home/user/Books", readonly = true, cache = "always" },
    { path = "/srv/all", tag = "all", uid_map = "0 0 65535", gid_map = "0 0 65535" },
    { path = "/srv/one", tag = "one", uidmap = "1000 1234 1", gidmap = "1000 1234 1" },
]
"""
UNITS = "vmsilo-files-share@*"
TEMPLATE = "/var/lib/vmsilo/home-template"
SETUP = f"""
mkdir -p /srv/desk/inner '/srv/books and more' /srv/all /srv/one
useradd -u 1234 -M other 2>/dev/null || true
chown -R user:user /srv/desk '/srv/books and more'; chown 1234:1234 /srv/one
echo a book > '/srv/books and more/book'
echo from-host > /srv/desk/note; chown user:user /srv/desk/note; chmod 600 /srv/desk/note
echo secret > /srv/secret; chmod 644 /srv/secret
ln -s /srv/secret /srv/desk/link; ln -s ../secret /srv/desk/up
mkdir {TEMPLATE}/.config; echo set > {TEMPLATE}/.config/app; ln -s /etc/shadow {TEMPLATE}/shadow
echo '#!/bin/sh' > {TEMPLATE}/tool; mkfifo {TEMPLATE}/pipe
chown -hR user:user {TEMPLATE}; chmod 4755 {TEMPLATE}/tool
"""


@pytest.fixture(scope="module")
def files(host: Container) -> Iterator[Container]:
    if host.run("test -x /usr/libexec/virtiofsd", check=False).returncode:
        pytest.skip("this host has no virtiofsd")
    host.run(SETUP)
    host.write("/etc/vmsilo/vms.d/files.toml", VM)
    host.wait_until("test -S /run/vmsilo/files-command.socket")
    host.run(["vm-start", "files", "--wait"], user="user")
    yield host
    host.run("vm-stop --force files; rm /etc/vmsilo/vms.d/files.toml", check=False)
    host.wait_until("test ! -e /run/systemd/system/vmsilo-files.socket")
    assert not host.run("find /run/systemd/system -name 'vmsilo-files*'").stdout


def guest(host: Container, command: str, *, root: bool = False, check: bool = True) -> str:
    options = ["--root"] if root else []
    done = host.run(["vm-run", *options, "files", "sh", "-c", command], user="user", check=False)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout if check else done.stdout + done.stderr


def start(host: Container) -> None:
    host.run(["vm-start", "files", "--wait"], user="user")


def test_the_home_is_a_copy_of_the_template(files: Container) -> None:
    assert files.run("stat -c '%U %a' /shared /shared/files").stdout == "user 700\nuser 700\n"
    assert guest(files, "cat ~/.config/app; readlink ~/shadow; ls -A ~").split() == [
        *("set", "/etc/shadow", ".config", "Books", "shadow", "tool"),
    ]
    assert files.run("stat -c '%U %a' /shared/files/tool").stdout == "user 755\n"
    assert guest(files, "stat -f -c %T ~").strip() in ("fuse", "fuseblk", "virtiofs", "UNKNOWN (0x65735546)")


def test_both_directions_with_the_right_owners(files: Container) -> None:
    guest(files, "echo hello > ~/new; mkdir ~/dir; echo x > ~/dir/x")
    assert files.run("cat /shared/files/new; stat -c %U:%G /shared/files/new /shared/files/dir").stdout == (
        "hello\nuser:user\nuser:user\n"
    )
    guest(files, "echo root > ~/roots", root=False)
    guest(files, "echo root > /home/user/by-root; chown root:root /home/user/by-root", root=True)
    assert files.run("stat -c %U:%G /shared/files/by-root").stdout == "user:user\n"
    assert guest(files, "stat -c %U:%G ~/by-root ~/new ~") == "user:user\n" * 3
    files.run("echo from host > /shared/files/host-file; chown user:user /shared/files/host-file")
    assert guest(files, "stat -c %U ~/host-file; echo more >> ~/host-file; cat ~/host-file") == (
        "user\nfrom host\nmore\n"
    )
    assert guest(files, "cat /mnt/desk/note; stat -c '%U %a' /mnt/desk/note") == "from-host\nuser 600\n"


def test_a_setuid_program_is_refused(files: Container) -> None:
    guest(files, "cp /bin/true ~/suid; chmod 4755 ~/suid", check=False)
    guest(files, "chmod 4755 /home/user/suid; chmod 2755 /home/user/dir", root=True, check=False)
    assert not files.run("find /shared /srv -perm /6000").stdout


def test_readonly_is_refused_on_both_sides(files: Container) -> None:
    assert guest(files, "cat ~/Books/book") == "a book\n"
    assert "Read-only" in guest(files, "echo x > ~/Books/new", check=False)
    remounted = guest(
        files,
        "mount -o remount,rw /home/user/Books && echo x > /home/user/Books/new",
        root=True,
        check=False,
    )
    assert "Read-only" in remounted or "denied" in remounted or "refused" in remounted, remounted
    assert files.run("ls '/srv/books and more'").stdout == "book\n"


def test_links_and_parents_lead_nowhere_outside(files: Container) -> None:
    """The guest follows links by itself, in its own file system."""
    assert "No such file" in guest(files, "cat /mnt/desk/link", check=False)
    assert "No such file" in guest(files, "cat /mnt/desk/up", root=True, check=False)
    assert guest(files, "ls /mnt/desk/..").split() == ["all", "desk", "one"]
    guest(files, "ln -s /etc/shadow ~/out; ln -s ../../../../etc/debian_version ~/out2")
    assert guest(files, "cat ~/out2") == guest(files, "cat /etc/debian_version")
    assert "Permission denied" in guest(files, "cat ~/out", check=False)


def test_virtiofsd_sees_its_directory_and_nothing_else(files: Container) -> None:
    units = files.run(f"systemctl list-units --plain --no-legend '{UNITS}' | cut -d' ' -f1").stdout.split()
    assert len(units) == 5
    for unit in units:
        pid = files.run(["systemctl", "show", "-P", "MainPID", unit]).stdout.strip()
        status = dict(
            line.split(":\t", 1)
            for line in files.run(f"cat /proc/{pid}/status").stdout.splitlines()
            if ":\t" in line
        )
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        many = unit.endswith("@all.service")
        owner = "0" if many else "1234" if unit.endswith("@one.service") else "1000"
        assert status["Uid"].split()[0] == owner
        assert int(status["CapEff"], 16) == (0b11011011 if many else 0)
        top = files.run(f"ls -A /proc/{pid}/root").stdout.split()
        assert set(top) <= {"dev", "etc", "lib", "lib64", "proc", "run", "share", "sys", "usr"}, top
        assert files.run(f"nsenter -t {pid} -n ls /sys/class/net").stdout.split() == ["lo"]
        # Of processes it sees itself alone.
        assert files.run(
            f"nsenter -t {pid} -m -p ls /proc | grep -c '^[0-9]'", check=False
        ).stdout.strip() in ("1", "2")


def test_maps_of_one_and_of_many(files: Container) -> None:
    guest(files, "echo x > /mnt/all/by-root; echo y > /mnt/all/by-7; chown 7:8 /mnt/all/by-7", root=True)
    assert files.run("stat -c %u:%g /srv/all/by-root /srv/all/by-7").stdout == "0:0\n7:8\n"
    assert not files.run("find /srv/all -perm /6000").stdout
    guest(files, "echo mine > /mnt/one/mine")
    assert files.run("stat -c %u:%g /srv/one/mine").stdout == "1234:1234\n"
    assert guest(files, "stat -c %U /mnt/one/mine") == "user\n"
    guest(files, "echo x > /mnt/one/by-root", root=True, check=False)
    assert files.run("ls /srv/one").stdout == "mine\n"


def test_status_lists_the_shares(files: Container) -> None:
    status = json.loads(files.run("vmsilo status --json files").stdout)
    assert status["Shares"][:3] == [
        "/shared/files:/home/user",
        "/srv/desk:/mnt/desk",
        "/srv/books and more:/home/user/Books:ro",
    ]


def test_a_virtiofsd_that_ends_takes_the_vm_with_it_and_says_so(files: Container) -> None:
    start(files)
    files.run("systemctl kill -s KILL --kill-whom=main vmsilo-files-share@desk.service")
    files.wait_until("vmsilo list | grep -q 'files *failed'")
    assert (
        "the virtiofsd of its shared directory 'desk' ended by signal 9"
        in files.vms()["files"]["LastResult"]
    )
    nothing_runs(files)


def test_nothing_runs_after_a_stop_and_the_home_is_kept(files: Container) -> None:
    start(files)
    assert guest(files, "cat ~/new") == "hello\n"
    files.run(["vm-stop", "files"], user="user")
    nothing_runs(files)
    assert files.run("cat /shared/files/new").stdout == "hello\n"


def test_nothing_runs_after_the_vmm_was_killed(files: Container) -> None:
    start(files)
    files.run("systemctl kill -s KILL --kill-whom=main vmsilo-files-vm.service")
    files.wait_until("vmsilo list | grep -q 'files *failed'")
    assert "signal 9" in files.vms()["files"]["LastResult"] or "killed" in files.vms()["files"]["LastResult"]
    nothing_runs(files)


def test_shares_outlive_vmsilod_and_end_with_the_vm(files: Container) -> None:
    start(files)
    files.kill_main("vmsilod.service")
    assert guest(files, "echo on > ~/while-away; cat ~/while-away") == "on\n"
    files.wait_until("vmsilo list >/dev/null")
    files.run(
        "systemctl kill -s KILL --kill-whom=main vmsilod.service; systemctl stop vmsilo-files-vm.service"
    )
    files.wait_until("vmsilo list | grep -q 'files *\\(failed\\|stopped\\)'")
    nothing_runs(files)


def test_a_start_survives_a_kill_of_vmsilod_at_its_shares(files: Container) -> None:
    files.run("systemctl start --no-block vmsilo-files-vm.service")
    files.wait_until("systemctl -q is-active vmsilo-files-share@desk.service")
    files.kill_main("vmsilod.service")
    files.wait_until("vmsilo list | grep -q 'files *running'", seconds=120)
    assert files.run("pgrep -c virtiofsd").stdout == "5\n"
    assert guest(files, "cat ~/new /mnt/desk/note") == "hello\nfrom-host\n"


def test_a_share_that_does_not_serve_yet_is_stopped_at_once(files: Container) -> None:
    """As the first process of a namespace it is not ended by a SIGTERM that it does not handle."""
    files.run(["vm-stop", "files"], user="user")
    unit = "vmsilo-files-share@desk.service"
    files.run("systemctl kill -s STOP --kill-whom=main vmsilod.service")  # so it waits for the answer
    try:
        files.run(f"systemctl start --no-block --job-mode=ignore-requirements {unit}")
        files.wait_until(f"grep -qx vmsilo-share /proc/$(systemctl show -P MainPID {unit})/comm")
        files.run(f"systemctl stop {unit}", timeout=20)
    finally:
        files.run("systemctl kill -s CONT --kill-whom=main vmsilod.service")
    files.run(f"systemctl reset-failed {unit}", check=False)
    nothing_runs(files)


def test_a_guest_that_reboots_has_its_shares(files: Container) -> None:
    start(files)
    before = guest(files, "cat /proc/sys/kernel/random/boot_id")
    guest(files, "systemctl reboot --no-block", root=True, check=False)
    as_user = "setpriv --reuid user --regid user --init-groups"
    files.wait_until(
        f"test $({as_user} vm-run files cat /proc/sys/kernel/random/boot_id) != {before.strip()}",
        seconds=120,
    )
    assert guest(files, "cat ~/new /mnt/desk/note") == "hello\nfrom-host\n"


def nothing_runs(host: Container) -> None:
    host.wait_until("! pgrep virtiofsd")
    host.wait_until("test ! -e /run/vmsilo/vm/files")
    assert not host.run(f"systemctl list-units --all --plain --no-legend '{UNITS}'").stdout


def test_what_cannot_be_shared_is_said(files: Container) -> None:
    files.run("vm-stop --force files", check=False)
    files.run("mv /srv/desk /srv/away; ln -s /srv/away /srv/desk; chown -h user:user /srv/desk")
    try:
        failed = files.run(["vm-start", "files", "--wait"], user="user", check=False)
        assert failed.returncode != 0
        assert "is a symbolic link" in failed.stderr
    finally:
        files.run("rm /srv/desk; mv /srv/away /srv/desk")
    files.run("mv /shared/files /shared/kept; chown root /shared/kept; mv /shared/kept /shared/files")
    try:
        failed = files.run(["vm-start", "files", "--wait"], user="user", check=False)
        assert "belongs to uid 0, not to the configured user" in failed.stderr
    finally:
        files.run("chown user /shared/files")
    nothing_runs(files)


def test_a_home_that_does_not_fit_leaves_nothing_half_done(files: Container) -> None:
    files.run("vm-stop --force files", check=False)
    files.run(
        "mv /shared/files /srv/kept-home;"
        "mount -t tmpfs -o size=64k,uid=1000,gid=1000,mode=700 small /shared;"
        f"head -c 200000 /dev/zero > {TEMPLATE}/big; chown user {TEMPLATE}/big"
    )
    try:
        failed = files.run(["vm-start", "files", "--wait"], user="user", check=False)
        assert "could not be made" in failed.stderr
        assert not files.run("ls -A /shared").stdout
        assert "No space left" in files.run("journalctl -o cat -u vmsilo-files-home.service").stdout
    finally:
        files.run(f"umount /shared; rm {TEMPLATE}/big; mv /srv/kept-home /shared/files")
    nothing_runs(files)
