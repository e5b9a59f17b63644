"""Versions of images under running VMs: who protects them, who hears of a switch, what is refused."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import pytest
from hosts.standin.site import unit
from image_tree import FIRST, SECOND, THIRD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.container import Result
    from hosts.standin.site import Site

NUMBERS = itertools.count(1)


@pytest.fixture
def image(site: Site) -> Iterator[str]:
    """An image of the test's own with one version; gone afterwards, for nobody runs from it any more."""
    name = f"image{next(NUMBERS)}"
    site.make_image(name, FIRST)
    yield name
    for vm in [vm for vm, shown in site.host.vms().items() if shown["Image"] == name]:
        site.host.run(["vm-stop", vm])
    assert command(site, "rm", name, "--all").returncode == 0
    assert not site.host.run(["sh", "-c", "ls -d /var/lib/vmsilo/images/.[bg]*"], check=False).stdout


def command(site: Site, *words: str, user: str = "root") -> Result:
    return site.host.run(["vmsilo", "image", *words], user=user, check=False)


def versions(site: Site, image: str) -> list[str]:
    rows = json.loads(command(site, "list", "--json").stdout)
    return sorted(row["version"] for row in rows if row["name"] == image)


def roots_of(site: Site, name: str) -> str:
    """What the VMM has open of images, as its process shows it."""
    return site.host.run(f"ls -l /proc/{site.main_pid(name)}/fd | grep root.erofs").stdout


def wait_for_restart_needed(site: Site, name: str, *, needed: bool) -> None:
    want = "true" if needed else "false"
    site.host.wait_until(
        f'vmsilo list --json | tr -d \' \\n\' | grep -q \'"Name":"{name}"[^}}]*"RestartNeeded":{want}\'',
        seconds=5,
    )


def test_a_running_vm_protects_its_version(site: Site, image: str) -> None:
    """By its record, also while vmsilod is down and in the hands of the next one; and by its descriptors."""
    name = site.running(text=f'image = "{image}"\n')
    site.make_image(image, SECOND)
    site.make_image(image, THIRD)
    for step in ("true", "systemctl restart vmsilod", "systemctl kill -s KILL vmsilod && sleep 1"):
        site.host.run(step)
        site.wait_for_state(name, "running")
        refused = command(site, "rm", image, FIRST)
        assert refused.returncode == 1
        assert f"VM {name} runs from version {FIRST} of image {image}" in refused.stderr
    site.host.run("systemctl stop vmsilod.service")
    assert command(site, "rm", image, FIRST).returncode == 1
    assert command(site, "rm", image, "--all").returncode == 1
    site.host.run(f"mv /run/vmsilo/state/{name}.json /run/vmsilo/hidden")
    refused = command(site, "rm", image, FIRST)
    assert refused.returncode == 1
    assert "root.erofs is in use by" in refused.stderr
    site.host.run(f"mv /run/vmsilo/hidden /run/vmsilo/state/{name}.json && systemctl start vmsilod")
    assert command(site, "gc", image, "--keep", "1").returncode == 0
    assert versions(site, image) == [FIRST, SECOND, THIRD]
    assert site.vm_run(name, "echo", "alive").stdout == "alive\n"
    site.host.run(["vm-stop", name])
    assert command(site, "gc", image, "--keep", "1").returncode == 0
    assert versions(site, image) == [SECOND, THIRD]


def test_a_vmm_that_was_killed_with_vmsilod_protects_nothing_in_the_end(site: Site, image: str) -> None:
    site.expect(r"was killed \(SIGKILL\)")
    name = site.running(text=f'image = "{image}"\n')
    site.make_image(image, SECOND)
    site.host.run("systemctl kill -s KILL --kill-whom=main vmsilod && systemctl stop vmsilod.service")
    site.host.run(["kill", "-9", str(site.main_pid(name))])
    site.host.wait_until(f"! systemctl -q is-active {unit(name)}")
    assert command(site, "rm", image, FIRST).returncode == 1  # nobody has seen its end yet
    site.host.run("systemctl start vmsilod.service")
    site.wait_for_state(name, "failed", "stopped")
    assert command(site, "rm", image, FIRST).returncode == 0


def test_a_switch_is_seen_at_once_and_holds_for_the_next_start(site: Site, image: str) -> None:
    name = site.running(text=f'image = "{image}"\n')
    other = site.running()
    assert site.show(name)["ImageVersion"] == FIRST
    assert not site.show(name)["RestartNeeded"]
    site.make_image(image, SECOND)
    wait_for_restart_needed(site, name, needed=True)
    assert not site.show(other)["RestartNeeded"]
    status = site.host.run(["vmsilo", "status", name]).stdout
    assert f"restart needed: its image {image} has another current version" in status
    assert f"/{FIRST}/root.erofs" in roots_of(site, name)
    site.host.run("systemctl restart vmsilod")
    assert site.show(name)["RestartNeeded"]
    site.host.run(["vm-stop", name])
    assert site.vm_run(name, "true").returncode == 0
    assert f"/{SECOND}/root.erofs" in roots_of(site, name)
    assert not site.show(name)["RestartNeeded"]
    back = command(site, "use", image, "previous")
    assert back.stdout.splitlines() == [
        f"{image}: {FIRST} is current now, {SECOND} was",
        f"VM {name} goes on with {SECOND} until it is restarted",
    ]
    wait_for_restart_needed(site, name, needed=True)
    assert command(site, "use", image, "previous").returncode == 0
    wait_for_restart_needed(site, name, needed=False)
    assert command(site, "use", image, FIRST).returncode == 0
    site.host.run(["vm-stop", name])
    assert site.vm_run(name, "true").returncode == 0
    assert f"/{FIRST}/root.erofs" in roots_of(site, name)


@pytest.mark.parametrize(
    ("harm", "fact"),
    [
        ("truncate -s 2 root.erofs", r"root.erofs is truncated: 2 bytes, not"),
        ("printf x | dd of=root.erofs conv=notrunc", "root.erofs is altered: its SHA-256 is not"),
        ("rm initrd", "initrd cannot be read: No such file"),
        ("echo > manifest.json", "has no manifest with digests"),
        ("chmod o+w vmlinuz", "vmlinuz can be written by others than root"),
        ("chown user .", "can be written by others than root"),
    ],
)
def test_what_is_not_as_it_was_built_is_refused(site: Site, image: str, harm: str, fact: str) -> None:
    """Although it was good a moment ago; and the version before it can be used instead."""
    site.expect("Failed to start|can be written|truncated|altered|cannot be read|no manifest|no usable")
    folder = site.make_image(image, SECOND)
    site.host.run(["ln", "-s", FIRST, f"{folder}/../previous"])
    name = site.running(text=f'image = "{image}"\n')
    site.host.run(["vm-stop", name])
    site.host.run(f"cd {folder} && {harm}")
    refused = site.vm_run(name, "true")
    assert refused.returncode == 125
    assert fact in refused.stderr or "no usable current version" in refused.stderr
    if "written by" not in fact:
        assert f"sudo vmsilo image use {image} previous" in refused.stderr
    assert command(site, "verify", image).returncode == 1
    assert command(site, "use", image, "previous").returncode == 0
    assert site.vm_run(name, "echo", "well").stdout == "well\n"


def test_a_user_sees_and_root_changes(site: Site, image: str) -> None:
    name = site.running(text=f'image = "{image}"\n')
    listed = command(site, "list", user="user")
    assert listed.stderr == ""
    (row,) = [line for line in listed.stdout.splitlines() if line.startswith(f"{image} ")]
    assert f"{name} (running)" in row
    for words in (("use", image, FIRST), ("rm", image, FIRST), ("gc",), ("build", image), ("clean",)):
        done = command(site, *words, user="user")
        assert done.returncode == 1
        assert "only root may" in done.stderr or "there is no recipe" in done.stderr
    assert command(site, "verify", image, user="user").returncode == 0
    assert site.host.run("stat -c %a /run/vmsilo/checked").stdout == "700\n"
