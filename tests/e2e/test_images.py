"""What a real build leaves, and a real VMM on a version that was copied."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hosts.container import Container

IMAGES = "/var/lib/vmsilo/images"


def test_a_build_says_what_is_in_it(host: Container) -> None:
    manifest = json.loads(host.run(f"cat {IMAGES}/default/current/manifest.json").stdout)
    packages = json.loads(host.run(f"cat {IMAGES}/default/current/packages.json").stdout)
    assert len(packages) == manifest["packages"] > 50
    assert packages["systemd"].startswith("257")
    assert manifest["recipe"]["suite"] == "trixie"
    assert "good" in host.run(["vmsilo", "image", "verify", "default", "current"], user="user").stdout
    files = "initrd", "packages.json", "root.erofs", "vmlinuz"
    assert sorted(manifest["sizes"]) == sorted(manifest["sha256"]) == sorted(files)


def test_a_copied_version_boots_and_is_protected_by_the_kernel(host: Container) -> None:
    version = host.run(f"readlink {IMAGES}/default/current").stdout.strip()
    host.run(f"mkdir {IMAGES}/copy && cp -a {IMAGES}/default/{version} {IMAGES}/copy/")
    try:
        host.run(["vmsilo", "image", "use", "copy", version])
        host.write("/etc/vmsilo/vms.d/copied.toml", 'image = "copy"\nmemory = 768\n')
        host.wait_until("systemctl -q is-active vmsilo-copied.socket", seconds=20)
        assert host.run(["vm-run", "copied", "echo", "well"], user="user").stdout == "well\n"
        listed = host.run(["vmsilo", "image", "list"], user="user").stdout
        assert any("copied (running)" in line for line in listed.splitlines() if line.startswith("copy"))
        remove = ["vmsilo", "image", "rm", "copy", "--all"]
        assert f"VM copied runs from version {version}" in host.run(remove, check=False).stderr
        host.run("systemctl stop vmsilod && mv /run/vmsilo/state/copied.json /run/vmsilo/hidden")
        refused = host.run(remove, check=False).stderr
        host.run("mv /run/vmsilo/hidden /run/vmsilo/state/copied.json && systemctl start vmsilod")
        assert "root.erofs is in use by qemu-system" in refused
        assert host.run(["vm-run", "copied", "echo", "alive"], user="user").stdout == "alive\n"
        host.run(["vm-stop", "copied"])
    finally:
        host.run(f"vm-stop --force copied; rm -rf /etc/vmsilo/vms.d/copied.toml {IMAGES}/copy", check=False)
