"""`make install` over what runs: the daemons are new ones, VMs and their commands go on."""

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
    demo.run("rm -r /srv/vmsilo /srv/wheels")
