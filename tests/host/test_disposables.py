"""Disposables: made for a command, gone with it, whoever dies when; and nothing of them is left."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
from hosts.layers import USER
from hosts.standin.site import SETTLE_SECONDS

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from hosts.standin.site import Site

ROUTED = """
[network]
allow = ["192.168.77.0/24:80/tcp"]
[network.interfaces.wan]
tap.host_address = "10.77.0.254/24"
addresses = ["10.77.0.1/24"]
routes."0.0.0.0/0" = { via = "10.77.0.254" }
"""


def wait_for(condition: Callable[[], bool], seconds: float = SETTLE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def instances(site: Site, template: str) -> list[dict[str, Any]]:
    return [vm for vm in site.host.vms().values() if vm["Template"] == template]


def gone(site: Site, template: str) -> bool:
    return not instances(site, template)


def start(site: Site, *command: str) -> subprocess.Popen[bytes]:
    return site.spawn("vm-run", "--disposable", *command, stdout=-1, stderr=-1)


def running(site: Site, template: str, *options: str) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    """A client whose command sleeps in a disposable, and the disposable."""
    client = start(site, *options, template, "sh", "-c", "echo up; sleep 300")
    assert client.stdout is not None
    line = client.stdout.readline()
    assert line == b"up\n", client.stderr and client.stderr.read()
    (vm,) = instances(site, template)
    return client, vm


def end(site: Site, client: subprocess.Popen[bytes], command: str, how: str = "KILL") -> int:
    """The client whose command line has these words; what runs here only waits for it."""
    site.host.run(["pkill", f"-{how}", "-f", f"vm-run --disposable (.* )?{command}"], check=False)
    return client.wait(20)


def kill_daemon(site: Site) -> None:
    site.host.kill_main("vmsilod.service")


def wait_for_daemon(site: Site) -> None:
    site.host.wait_until("systemctl -q is-active vmsilod.service", seconds=20)
    site.host.wait_until("busctl --system status org.vmsilo1", seconds=20)


def test_a_command_in_a_disposable(site: Site) -> None:
    template = site.define()
    done = site.vm_run("--disposable", template, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    wait_for(lambda: gone(site, template))
    assert site.state(template) == "stopped"  # of itself nothing was started


def test_it_is_listed_with_its_template(site: Site) -> None:
    template = site.define("memory = 333\n")
    client, vm = running(site, template)
    assert vm["Name"].startswith(f"{template}-d")
    assert (vm["State"], vm["Memory"], vm["Disposable"]) == ("running", 333, True)
    assert f"disposable of {template}" in site.host.run(["vmsilo", "list"]).stdout
    assert end(site, client, template, "TERM") == 128 + signal.SIGTERM
    wait_for(lambda: gone(site, template))


def test_two_at_a_time_have_nothing_in_common(site: Site) -> None:
    template = site.define(ROUTED)
    first, second = start(site, template, "sleep", "301"), start(site, template, "sleep", "301")
    wait_for(lambda: [vm["State"] for vm in instances(site, template)] == ["running"] * 2, seconds=30)
    one, other = instances(site, template)
    assert one["Uid"] != other["Uid"]
    networks = [site.host.run(["vmsilo", "status", "--json", vm["Name"]]).stdout for vm in (one, other)]
    assert networks[0] != networks[1]
    taps = site.host.run("ip -o -4 address").stdout
    assert taps.count("10.138.") == 2
    rules = site.host.run("nft list ruleset").stdout
    assert rules.count("192.168.77.0/24") >= 3  # of the template and of both
    end(site, first, template)
    second.wait(20)
    wait_for(lambda: gone(site, template))
    wait_for(lambda: "10.138." not in site.host.run("ip -o -4 address").stdout)


def test_a_template_that_is_closed_closes_its_disposables(site: Site) -> None:
    template = site.define(ROUTED)
    client, _vm = running(site, template)
    assert site.host.run("nft list ruleset").stdout.count("192.168.77.0/24") >= 2
    site.host.write(
        f"/etc/vmsilo/vms.d/{template}.toml", ROUTED.replace("192.168.77.0/24:80/tcp", "10.1.1.1/32")
    )
    wait_for(lambda: "192.168.77.0/24" not in site.host.run("nft list ruleset").stdout)
    site.host.write(f"/etc/vmsilo/vms.d/{template}.toml", "memory = 'much'\n")
    wait_for(lambda: site.state(template) == "broken")
    site.host.run(["rm", f"/etc/vmsilo/vms.d/{template}.toml"])
    wait_for(lambda: template not in site.host.vms())
    (vm,) = instances(site, template)
    assert (vm["State"], vm["RestartNeeded"]) == ("running", False)
    end(site, client, template)
    wait_for(lambda: gone(site, template))


def test_named_ones_are_shared_and_end_with_their_last_command(site: Site) -> None:
    template = site.define()
    first, vm = running(site, template, "--name", "box")
    assert vm["Name"] == "box"
    pid = vm["Pid"]
    second = start(site, "--name", "box", template, "sh", "-c", "echo up; sleep 302")
    assert second.stdout is not None
    assert second.stdout.readline() == b"up\n"
    end(site, first, f"{template} sh -c echo up; sleep 300")
    time.sleep(0.5)
    (vm,) = instances(site, template)
    assert (vm["State"], vm["Pid"]) == ("running", pid)
    end(site, second, template)
    done = site.vm_run("--disposable", "--name", "box", template, "echo", "anew")  # while the old one goes
    assert done.stdout == "anew\n"
    wait_for(lambda: gone(site, template))


def test_vm_stop_ends_it_for_good(site: Site) -> None:
    template = site.define()
    client, vm = running(site, template)
    site.host.run(["vm-stop", vm["Name"]], user=USER)
    assert client.wait(20) == 125
    assert client.stderr is not None
    assert b"the VM has stopped" in client.stderr.read()
    wait_for(lambda: gone(site, template))
    assert site.vm_run(vm["Name"], "true").returncode == 125


def test_names_and_limits(site: Site) -> None:
    template = site.define()
    done = site.vm_run("--disposable", "--name", template, template, "true")
    assert done.returncode == 125
    assert f"there is a VM '{template}' already" in done.stderr
    done = site.vm_run("--disposable", "absent", "true")
    assert done.returncode == 125
    assert "there is no VM 'absent'" in done.stderr
    with open_settings(site, "disposables.limit = 1\n"):
        client, _vm = running(site, template)
        done = site.vm_run("--disposable", template, "true")
        assert done.returncode == 125
        assert "there are 1 disposables already" in done.stderr
        end(site, client, template)
        wait_for(lambda: gone(site, template))


class open_settings:
    """vmsilo.toml with a line more, for a while."""

    def __init__(self, site: Site, text: str) -> None:
        self._site, self._text = site, text

    def __enter__(self) -> None:
        self._site.host.write("/etc/vmsilo/vmsilo.toml.d/10-test.toml", self._text)
        self._site.host.run("busctl call org.vmsilo1 /org/vmsilo1 org.vmsilo1.Manager Reload")

    def __exit__(self, *_: object) -> None:
        self._site.host.run("rm /etc/vmsilo/vmsilo.toml.d/10-test.toml")
        self._site.host.run("busctl call org.vmsilo1 /org/vmsilo1 org.vmsilo1.Manager Reload")


def test_a_start_that_fails_says_why_and_leaves_nothing(site: Site) -> None:
    site.expect("exit-3|status 3|QEMU")
    template = site.define(mode="exit-3")
    done = site.vm_run("--disposable", template, "true")
    assert done.returncode == 125
    assert "3" in done.stderr
    wait_for(lambda: gone(site, template))


def test_a_stranger_gets_none(site: Site) -> None:
    template = site.define()
    argv = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "vm-run", "--disposable"]
    done = site.host.run([*argv, template, "true"], check=False)
    assert done.returncode == 125
    assert "not allowed" in done.stderr
    assert gone(site, template)


def test_the_client_is_killed(site: Site) -> None:
    template = site.define()
    client, _vm = running(site, template)
    end(site, client, template)
    wait_for(lambda: gone(site, template))


@pytest.mark.parametrize("milliseconds", [0, 50, 100, 150, 200, 250, 300, 400, 600])
def test_the_client_is_killed_while_it_waits(site: Site, milliseconds: int) -> None:
    template = site.define()
    client = start(site, template, "sleep", "300")
    time.sleep(milliseconds / 1000)
    end(site, client, template)
    wait_for(lambda: gone(site, template))
    site.expect("Failed to start|failed to start")


@pytest.mark.parametrize("milliseconds", [0, 50, 100, 150, 200, 250, 300, 400, 600])
def test_vmsilod_is_killed_while_one_is_made(site: Site, milliseconds: int) -> None:
    """The caller is told, or served by the next vmsilod; either way nothing stays."""
    template = site.define()
    client = start(site, template, "echo", "there")
    time.sleep(milliseconds / 1000)
    kill_daemon(site)
    out, err = client.communicate(timeout=60)
    assert (client.returncode, out) == (0, b"there\n") or client.returncode == 125, err
    wait_for_daemon(site)
    wait_for(lambda: gone(site, template))
    site.expect("Failed to start|failed to start|vmsilod (died|does not answer)|QEMU was killed")


@pytest.mark.parametrize("milliseconds", [0, 20, 50, 100, 150, 200, 300, 400])
def test_vmsilod_is_killed_while_one_is_taken_away(site: Site, milliseconds: int) -> None:
    template = site.define(ROUTED)
    assert site.vm_run("--disposable", template, "true").returncode == 0
    time.sleep(milliseconds / 1000)
    kill_daemon(site)
    wait_for_daemon(site)
    wait_for(lambda: gone(site, template))
    wait_for(lambda: "10.138." not in site.host.run("ip -o -4 address").stdout)
    # The next vmsilod does not know that it was the last one who killed it.
    site.expect("vmsilod (died|does not answer)|QEMU was killed")


def test_one_outlives_vmsilod_as_long_as_its_client(site: Site) -> None:
    template = site.define(ROUTED)
    client, vm = running(site, template)
    kill_daemon(site)
    wait_for_daemon(site)
    time.sleep(1)
    (still,) = instances(site, template)
    assert (still["State"], still["Pid"]) == ("running", vm["Pid"])
    site.host.run("systemctl stop vmsilod.service")
    end(site, client, template)
    site.host.run("systemctl start vmsilod.service")
    wait_for_daemon(site)
    wait_for(lambda: gone(site, template))


def test_the_vmm_is_killed(site: Site) -> None:
    site.expect(r"QEMU was killed \(SIGKILL\)")
    template = site.define()
    client, vm = running(site, template)
    site.host.run(["kill", "-9", str(vm["Pid"])])
    assert client.wait(20) == 125
    assert client.stderr is not None
    assert b"QEMU was killed" in client.stderr.read()
    wait_for(lambda: gone(site, template))


def test_the_prompt_comes_back_before_the_clean_up(site: Site) -> None:
    """With a guest that does not go by itself: whoever waited for that would wait for the whole deadline."""
    template = site.define(mode="stubborn")
    began = time.monotonic()
    assert site.vm_run("--disposable", template, "true").returncode == 0
    assert time.monotonic() - began < 10
    wait_for(lambda: gone(site, template))


def test_two_hundred_in_a_row_leave_nothing(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """The fixture compares units, processes, files, descriptors, devices and rules; this looks at memory and
    at what systemd and the kernel keep besides.
    """
    template = site.define(ROUTED)
    count = int(os.environ.get("VMSILO_TEST_DISPOSABLES", "200"))
    warm_up = count // 2  # until then the heaps of the worker threads grow
    run_many(site, template, warm_up)
    before, began = measure(site), time.monotonic()
    run_many(site, template, count - warm_up)
    took = time.monotonic() - began
    after = measure(site)
    with capsys.disabled():
        print(f"\n{count - warm_up} disposables: {took:.1f} s, {before} before, {after} after")
    for daemon in ("vmsilod", "vmsilo-relayd", "vmsilo-consoled"):
        assert (after[daemon] - before[daemon]) / (count - warm_up) < 64, "KiB for each"
    for what in ("run", "temporary", "keys", "units"):
        assert after[what] <= before[what], what


def run_many(site: Site, template: str, count: int) -> None:
    one = f"vm-run --disposable {template} echo @"
    script = f"seq {count} | xargs -P2 -I@ sh -c '[ \"$({one})\" = @ ] || echo wrong @'"
    assert site.host.run(script, user=USER, timeout=400).stdout == ""
    wait_for(lambda: gone(site, template), seconds=60)


def measure(site: Site) -> dict[str, int]:
    found = {}
    for daemon in ("vmsilod", "vmsilo-relayd", "vmsilo-consoled"):
        pid = site.daemon_pid(f"{daemon}.service")
        found[daemon] = int(site.host.run(f"awk '/^VmRSS/ {{print $2}}' /proc/{pid}/status").stdout)
    for what, command in (
        ("run", "find /run -xdev ! -path '/run/log/*' ! -path '/run/systemd/journal/*' | wc -l"),
        ("temporary", "find /tmp /var/tmp -maxdepth 1 | wc -l"),
        ("keys", "find /var/lib/vmsilo | wc -l"),
        ("units", "systemctl list-units --all --no-legend --plain 'vmsilo*' | wc -l"),
    ):
        found[what] = int(site.host.run(command).stdout)
    return found
