"""The units that hold VM-to-VM networks, with the real systemd, for a process with vmsilod's sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hosts.container import Container
    from hosts.standin.site import Site

UNIT = "vmsilo-lab-switch.service"
PYTHON = "/usr/local/lib/vmsilo/venv/bin/python"
SCRIPT = "/run/switch-probe.py"
PROBE = """
import json, os, sys
sys.path[:0] = ["/usr/local/lib/vmsilo/daemon", "/usr/local/lib/vmsilo/guest"]
from ipaddress import ip_interface
from gi.repository import Gio, GLib
from vmsilod import loop
from vmsilod.network.plan import NetworkPlan, Port
from vmsilod.network.switch import Switches
from vmsilod.network.switch_units import SwitchUnits
from vmsilod.systemd import Systemd

def port(name, number):
    address = (ip_interface(f"10.1.0.{number}/24"), ip_interface(f"fd00:1::{number}/64"))
    return Port(name, "lan", f"{name}-0", f"02:00:00:00:00:0{number}", network="lab", addresses=address)

async def main(names):
    systemd = Systemd(Gio.bus_get_sync(Gio.BusType.SYSTEM), lambda unit: None)
    await systemd.subscribe()
    switches = Switches(SwitchUnits(systemd))
    ports = tuple(port(name, number) for number, name in enumerate(names, 2))
    await switches.apply(NetworkPlan(ports))
    opened = [await switches.open(each) for each in ports]
    return {"faults": switches.faults, "opened": len(opened)}

main_loop = GLib.MainLoop()
future = loop.spawn(main(sys.argv[1:]))
future.add_done_callback(lambda _: loop.call_soon(main_loop.quit))
main_loop.run()
print(json.dumps(future.result()), flush=True)
os.kill(os.getpid(), 9) if len(sys.argv) > 1 else None
"""


def properties_of_vmsilod(host: Container) -> list[str]:
    """Its sandbox, as installed."""
    wanted = (
        *("CapabilityBoundingSet", "NoNewPrivileges", "ProtectSystem", "ReadWritePaths", "SystemCallFilter"),
        *("RestrictAddressFamilies", "PrivateTmp", "ProtectHome", "ProtectKernelModules", "UMask"),
    )
    lines = host.run(["cat", "/usr/lib/systemd/system/vmsilod.service"]).stdout.splitlines()
    return [f"--property={line}" for line in lines if line.partition("=")[0] in wanted]


def probe(host: Container, *names: str) -> dict[str, object]:
    """A short-lived vmsilod's part, killed at the end unless it is to remove everything."""
    argv = ["systemd-run", "--wait", "--pipe", "--quiet", *properties_of_vmsilod(host)]
    done = host.run([*argv, PYTHON, "-I", SCRIPT, *names], check=False)
    assert done.stdout, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_unit_holds_the_network_beyond_whoever_made_it(site: Site) -> None:
    host = site.host
    host.write(SCRIPT, PROBE)
    assert probe(host, "alpha", "beta") == {"faults": {}, "opened": 2}
    pid = host.run(["systemctl", "show", "-P", "MainPID", UNIT]).stdout.strip()
    inside = ["nsenter", "-t", pid, "-n"]
    before = host.run([*inside, "ip", "-o", "link"]).stdout
    rules = host.run([*inside, "nft", "list", "ruleset"]).stdout
    assert "alpha-0" in before
    assert "chain check_arp" in rules
    assert "alpha-0" not in host.run(["ip", "-o", "link"]).stdout
    assert not host.run(["nft", "list", "ruleset"]).stdout
    status = dict(
        line.split(":\t", 1)
        for line in host.run(["cat", f"/proc/{pid}/status"]).stdout.splitlines()
        if ":\t" in line
    )
    assert int(status["CapBnd"], 16) == int(status["CapEff"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    # Another one adopts it as it is; a change reaches it; and with the last port it goes.
    assert probe(host, "alpha", "beta") == {"faults": {}, "opened": 2}
    assert host.run(["systemctl", "show", "-P", "MainPID", UNIT]).stdout.strip() == pid
    shown = host.run([*inside, "ip", "-o", "link"]).stdout
    assert [line.split()[0] for line in shown.splitlines()] == [
        line.split()[0] for line in before.splitlines()
    ]
    assert probe(host, "alpha") == {"faults": {}, "opened": 1}
    assert "beta-0" not in host.run([*inside, "ip", "-o", "link"]).stdout
    host.run(["systemctl", "kill", "-s", "KILL", UNIT])  # what is in it is lost, and made again
    assert probe(host, "alpha", "beta") == {"faults": {}, "opened": 2}
    assert probe(host) == {"faults": {}, "opened": 0}
    assert host.run(["systemctl", "show", "-P", "LoadState", UNIT]).stdout.strip() == "not-found"
    assert not (Path(host.root) / "run/systemd/system" / UNIT).exists()
    host.run(["rm", SCRIPT])
