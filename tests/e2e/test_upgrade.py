"""`make install` over what runs: the daemons are new ones, VMs and their commands go on. `make uninstall`:
the last test of this tier, after which there is no vmsilo.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

from hosts import layers

if TYPE_CHECKING:
    from hosts.container import Container

DAEMONS = ("vmsilod", "vmsilo-relayd", "vmsilo-consoled")
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/srv/wheels"}


def pids(host: Container, *units: str) -> list[int]:
    return [int(host.run(f"systemctl show -P MainPID {unit}.service").stdout) for unit in units]


def test_an_upgrade_keeps_vms_and_their_commands(demo: Container) -> None:
    layers.copy_sources(demo.root / "srv/vmsilo")
    shutil.copytree(demo.wheels, demo.root / "srv/wheels")
    command = ["vm-run", "demo", "sh", "-c", "echo begun; read line; echo $line"]
    running = demo.popen(command, user="user", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert running.stdout is not None
    assert running.stdout.readline() == b"begun\n"
    before, vm = pids(demo, *DAEMONS), pids(demo, "vmsilo-demo-vm")

    demo.run("make -C /srv/vmsilo install", env=OFFLINE)

    after = pids(demo, *DAEMONS)
    assert 0 not in after
    assert not set(before) & set(after)
    assert pids(demo, "vmsilo-demo-vm") == vm
    output, _ = running.communicate(b"goes on\n", timeout=60)
    assert (output, running.returncode) == (b"goes on\n", 0)
    assert demo.run(["vm-run", "demo", "echo", "warm"], user="user").stdout == "warm\n"
    assert "Debian GNU/Linux" in demo.run(["vm-shell", "--log", "demo"], user="user").stdout
    assert demo.vms()["demo"]["RestartNeeded"] is False
    demo.run("rm -r /srv/wheels")


KEPT = (
    "/root",
    "/etc/vmsilo",
    "/etc/firewalld",
    "/var/lib/vmsilo",
    "/shared",
    "/srv",
    "/var/log",
    "/var/cache",
    "/var/tmp",
    "/proc",
    "/sys",
)
ROUTED = """
[network.interfaces.wan]
tap.host_address = "10.99.1.1/24"
addresses = ["10.99.1.2/24"]
[network.interfaces.inner]
type = "vm-switch"
vm_network.name = "inner"
addresses = ["10.98.1.1/24"]
"""


def test_nothing_is_left_of_what_was_uninstalled(demo: Container) -> None:
    with_net = demo.run("test -c /dev/net/tun", check=False).returncode == 0
    if with_net:
        demo.write("/etc/vmsilo/vms.d/routed.toml", ROUTED)
        demo.wait_until("ip link show routed-0 && nft list tables | grep -q vmsilo")
    if not (demo.root / "srv/vmsilo").exists():
        layers.copy_sources(demo.root / "srv/vmsilo")

    demo.run("make -C /srv/vmsilo uninstall")

    pruned = " -o ".join(f"-path {place}" for place in KEPT)
    left = demo.run(
        f"find / \\( {pruned} \\) -prune -o -iname '*vmsilo*' -print -o -name 'vm-run*' -print"
    ).stdout
    # What systemd-sysusers and systemd-tmpfiles made stays with its accounts.
    assert left.split() == [], left
    assert demo.run("systemctl list-units --all --plain --no-legend 'vmsilo*'").stdout == ""
    assert demo.run("pgrep -a 'vmsilo|qemu|virtiofsd|vhost-device'", check=False).stdout == ""
    assert "vmsilo" not in demo.run("nft list tables").stdout
    assert "routed-0" not in demo.run("ip -o link").stdout
    assert demo.run("test -d /var/lib/vmsilo/images/default").returncode == 0
