"""Disks of VMs whose VMM is a stand-in: who has which, what a crash leaves, and the commands."""

from __future__ import annotations

import json
import re
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.standin.site import Site

FOLDER = "/var/lib/vmsilo/disks"
OVERLAYS = "/var/lib/vmsilo/overlays"


@pytest.fixture(autouse=True)
def clean(site: Site) -> Iterator[None]:
    site.expect("Failed to start|this disk|is locked by")
    yield
    site.host.run(f"rm -f {FOLDER}/* /var/lib/vmsilo/persist/*", check=False)


def disks_of(site: Site, name: str = "") -> dict[str, dict[str, Any]]:
    argv = ["vmsilo", "disk", "list", "--json", *([name] if name else [])]
    return {disk["Id"]: disk for disk in json.loads(site.host.run(argv, user="user").stdout)}


def holders_of_overlays(site: Site) -> set[str]:
    """The units whose processes have one open."""
    found = site.host.run(f"find /proc/[0-9]*/fd -lname '{OVERLAYS}/*' 2>/dev/null", check=False).stdout
    pids = {line.split("/")[2] for line in found.splitlines()}
    groups = [site.host.run(["cat", f"/proc/{pid}/cgroup"]).stdout for pid in pids]
    return {unit for text in groups for unit in re.findall(r"[^/\n]+\.service", text)}


def test_an_overlay_has_no_name_and_ends_with_its_vmm(site: Site) -> None:
    site.expect("was killed")
    name = site.running()
    assert holders_of_overlays(site) == {f"vmsilo-{name}-vm.service"}  # and no daemon
    assert "is on the host's disk as it is" in site.journal_of(name)  # this image's guest encrypts nothing
    assert site.host.run(f"find {OVERLAYS} -mindepth 1").stdout == ""
    site.host.run(["kill", "-9", str(site.main_pid(name))])
    site.wait_for_state(name, "failed")
    assert holders_of_overlays(site) == set()


def test_a_vmsilod_that_is_killed_leaves_and_loses_no_disk(site: Site) -> None:
    text = f'additional_disks = [{{ path = "{FOLDER}/data", id = "data", create = {{ size = "16M" }} }}]'
    name = site.running(text=text)
    site.host.run(["kill", "-9", str(site.daemon_pid("vmsilod.service"))])
    site.host.wait_until("busctl status org.vmsilo1 >/dev/null 2>&1", seconds=20)
    assert holders_of_overlays(site) == {f"vmsilo-{name}-vm.service"}
    assert disks_of(site, name)["data"]["State"] == "in use"
    other = site.define(f'additional_disks = ["{FOLDER}/data"]')
    refused = site.host.run(["vm-start", other], user="user", check=False)
    assert f"VM '{name}', which runs, is writing this disk" in refused.stderr
    site.host.run(["vm-stop", name], user="user")
    assert site.vm_run(other, "true").returncode == 0


def test_root_disk_of_another_vm_is_no_disk_for_this_one(site: Site) -> None:
    site.host.run(f"install -m 600 /dev/null {FOLDER}/root && truncate -s 16M {FOLDER}/root")
    name = site.running(text=f'root_disk = "{FOLDER}/root"\nroot_disk_readonly = false')
    site.host.run(f"ln -s root {FOLDER}/other-name")
    other = site.define(f'additional_disks = [{{ path = "{FOLDER}/other-name", ro = true }}]')
    refused = site.host.run(["vm-start", other], user="user", check=False)
    assert refused.returncode == 1
    assert f"VM '{name}', which runs, is writing this disk" in refused.stderr


def test_readers_share_a_disk(site: Site) -> None:
    site.host.run(f"truncate -s 16M {FOLDER}/shared")
    text = f'additional_disks = [{{ path = "{FOLDER}/shared", ro = true }}]'
    site.running(text=text)
    site.running(text=text)
    writer = site.define(f'additional_disks = ["{FOLDER}/shared"]')
    refused = site.host.run(["vm-start", writer], user="user", check=False)
    assert "is reading this disk" in refused.stderr


def test_disk_that_a_program_of_the_host_has_locked(site: Site) -> None:
    site.host.run(f"truncate -s 16M {FOLDER}/locked")
    name = site.define(f'additional_disks = ["{FOLDER}/locked"]')
    code = f"import fcntl; f = open('{FOLDER}/locked'); fcntl.flock(f, 2); print(1, flush=True); input()"
    locker = site.spawn("python3", "-c", code, user="root", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert locker.stdin
    assert locker.stdout
    try:
        assert locker.stdout.readline() == b"1\n"
        refused = site.host.run(["vm-start", name], user="user", check=False)
        assert "is locked by another program" in refused.stderr
    finally:
        locker.communicate(b"\n")
    assert site.vm_run(name, "true").returncode == 0


def test_grown_and_removed_when_nobody_has_it(site: Site) -> None:
    text = f"""
persist = ["/etc/ssh"]
persist_size = "16M"
additional_disks = [{{ path = "{FOLDER}/data", id = "data", create = {{ size = "16M" }} }}]
"""
    name = site.define(text)
    assert disks_of(site, name)["data"]["State"] == "not created"
    assert site.vm_run(name, "true").returncode == 0
    removed = site.host.run(["vmsilo", "disk", "remove", name, "persist"], user="user", check=False)
    assert (removed.returncode, "runs with it" in removed.stderr) == (1, True)
    site.host.run(["vm-stop", name], user="user")

    site.host.run(["vmsilo", "disk", "grow", name, "data", "32M"], user="user")
    site.host.run(["vmsilo", "disk", "grow", name, "persist", "24M"], user="user")
    sizes = {disk["Id"]: disk["Size"] >> 20 for disk in disks_of(site, name).values()}
    assert sizes == {"overlay": 10240, "persist": 24, "data": 32}
    shrunk = site.host.run(["vmsilo", "disk", "grow", name, "data", "16M"], user="user", check=False)
    assert (shrunk.returncode, "never made smaller" in shrunk.stderr) == (1, True)
    foreign = site.host.run(["vmsilo", "disk", "remove", name, "data"], user="user", check=False)
    assert (foreign.returncode, "a file of yours" in foreign.stderr) == (1, True)

    # What it kept outlasts its file, and goes only when somebody says so.
    site.host.run(f"rm /etc/vmsilo/vms.d/{name}.toml")
    site.host.wait_until(f"test ! -e /run/systemd/system/vmsilo-{name}.socket")
    assert disks_of(site)["persist"]["State"] == "left behind"
    site.host.run(["vmsilo", "disk", "remove", name, "persist"], user="user")
    assert "persist" not in disks_of(site)


def test_disks_are_not_for_other_users(site: Site) -> None:
    name = site.define('persist = ["/etc/ssh"]')
    for argv in (("list",), ("grow", name, "persist", "8G"), ("remove", name, "persist")):
        done = site.host.run(["vmsilo", "disk", *argv], user="mallory", check=False)
        assert (done.returncode, "not allowed" in done.stderr) == (1, True)
