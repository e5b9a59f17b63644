"""vm-run as users meet it: many at once, killed, detached, its exit codes and its options."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from hosts.layers import USER

if TYPE_CHECKING:
    from collections.abc import Callable

    from hosts.standin.site import Site


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def runs(site: Site, marker: str) -> bool:
    return not site.host.run(["pgrep", "-f", f"^sleep {marker}$"], check=False).returncode


def test_two_hundred_commands_at_once(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    name = site.running()
    script = f"seq 200 | xargs -P200 -I@ sh -c '[ \"$(vm-run {name} echo @)\" = @ ] || echo wrong @'"
    begin = time.monotonic()
    done = site.host.run(script, user=USER, timeout=120)
    with capsys.disabled():
        print(f"\n200 concurrent commands: {time.monotonic() - begin:.1f} s")
    assert done.stdout == ""


def test_much_data_both_ways(site: Site) -> None:
    name = site.running()
    script = f"head -c 30000000 /dev/urandom > in; vm-run {name} cat < in > out; cmp in out; rm in out"
    assert site.host.run(script, user=USER, cwd=None).stdout == ""


def test_a_killed_client_takes_its_command_along(site: Site) -> None:
    name = site.running()
    client = site.spawn("vm-run", name, "sleep", "987651")
    wait_for(lambda: runs(site, "987651"))
    site.host.run(["pkill", "-KILL", "-f", f"vm-run {name} sleep 987651"])
    client.wait(10)
    wait_for(lambda: not runs(site, "987651"))


def test_a_detached_command_outlives_its_client_and_dies_with_its_vm(site: Site) -> None:
    name = site.running()
    begin = time.monotonic()
    assert site.vm_run("--detach", name, "sleep", "987652").returncode == 0
    assert time.monotonic() - begin < 5
    assert runs(site, "987652")
    site.host.run(["vm-stop", name], user=USER)
    assert not runs(site, "987652")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_command(site: Site, number: signal.Signals) -> None:
    name = site.running()
    client = site.spawn("vm-run", name, "sleep", "987653")
    wait_for(lambda: runs(site, "987653"))
    site.host.run(["pkill", f"-{number.name.removeprefix('SIG')}", "-f", f"vm-run {name} sleep 987653"])
    # nsenter ends as the client did: by exit status, since the client turned the signal into one.
    assert client.wait(10) == 128 + number
    assert not runs(site, "987653")


def test_a_vm_killed_under_a_command(site: Site) -> None:
    site.expect(r"QEMU was killed \(SIGKILL\)")
    name = site.running()
    client = site.spawn("vm-run", name, "sleep", "987654", stderr=-1)
    wait_for(lambda: runs(site, "987654"))
    site.host.run(["kill", "-9", str(site.main_pid(name))])
    _, err = client.communicate(timeout=20)
    reason = b"vm-run: the connection to the guest was lost: QEMU was killed (SIGKILL)\n"
    assert (client.returncode, err.splitlines(keepends=True)[0]) == (125, reason)
    site.wait_for_state(name, "failed")


def test_exit_codes(site: Site) -> None:
    name = site.running()
    for command, status, error in (
        (("sh", "-c", "exit 42"), 42, ""),
        (("sh", "-c", "kill -KILL $$"), 137, ""),
        (("no-such-program",), 127, "vm-run: no-such-program: command not found\n"),
        (("/etc/passwd",), 126, "vm-run: /etc/passwd: Permission denied\n"),
    ):
        done = site.vm_run(name, *command)
        assert (done.returncode, done.stderr) == (status, error)
    done = site.vm_run("--cwd", "/nowhere", name, "true")
    assert done.returncode == 125
    assert done.stderr.startswith("vm-run: cannot enter /nowhere")


def test_no_start(site: Site) -> None:
    name = site.define()
    done = site.vm_run("--no-start", name, "true")
    assert (done.returncode, done.stderr) == (
        125,
        f"vm-run: VM '{name}' is not running\nhint: vm-start {name}\n",
    )
    assert site.state(name) == "stopped"
    assert site.vm_run(name, "true").returncode == 0
    assert site.vm_run("--no-start", name, "true").returncode == 0


def test_as_root_of_the_guest(site: Site) -> None:
    name = site.define()
    done = site.vm_run("--root", name, "sh", "-c", "echo $USER; cat", input="in\n")
    assert (done.returncode, done.stdout) == (0, "root\nin\n"), done.stderr
    assert site.vm_run(name, "sh", "-c", "echo $USER").stdout == "user\n"


def test_an_unknown_vm_offers_the_closest_name(site: Site) -> None:
    site.define(name="banking")
    for command in (["vm-run", "bankign", "true"], ["vm-start", "bankign"], ["vm-stop", "bankign"]):
        done = site.host.run(command, user=USER, check=False)
        assert done.returncode == (125 if command[0] == "vm-run" else 1)
        assert "did you mean 'banking'?" in done.stderr


def test_names_that_are_none(site: Site) -> None:
    for name in ("../x", "a/b", "", "A", "a\nb", "-x", "a" * 32, "relayd/../x", "é"):
        for command in (
            ["vm-run", "--", name, "true"],
            ["vm-start", "--", name],
            ["vmsilo", "status", "--", name],
        ):
            done = site.host.run(command, user=USER, check=False)
            assert done.returncode == (125 if command[0] == "vm-run" else 2), command
            assert "Traceback" not in done.stderr
            assert len(done.stderr.splitlines()) <= 2


def test_list_and_status_for_programs(site: Site) -> None:
    name = site.define("memory = 700\ncpus = 3")
    row = site.show(name)
    assert (row["State"], row["Memory"], row["Cpus"], row["Pid"]) == ("stopped", 700, 3, 0)
    assert site.host.run(["vmsilo", "status", name], user=USER, check=False).returncode == 3
    site.vm_run(name, "true")
    assert site.host.run(["vmsilo", "status", name], user=USER).returncode == 0
    table = site.host.run(["vmsilo", "list"], user=USER).stdout
    assert [line.split()[1] for line in table.splitlines() if line.split()[0] == name] == ["running"]


def test_environment_and_directory(site: Site) -> None:
    name = site.running()
    done = site.host.run(
        ["vm-run", "--env", "A=b c", "--cwd", "/usr", name, "sh", "-c", "echo $A $PWD $SECRET"],
        user=USER,
        env={"SECRET": "host's"},
    )
    assert done.stdout == "b c /usr\n"


def test_the_client_leaves_nothing_to_the_guest_that_did_not_concern_it(site: Site) -> None:
    name = site.running()
    seen = site.vm_run(name, "env", env={"SSH_AUTH_SOCK": "/x", "DISPLAY": ":0", "LC_ALL": "C.UTF-8"}).stdout
    variables = {line.partition("=")[0] for line in seen.splitlines()}
    assert "LC_ALL" in variables
    assert not variables & {"SSH_AUTH_SOCK", "DISPLAY"}


def test_a_stopped_client_does_not_stop_others(site: Site) -> None:
    name = site.running()
    flood = site.spawn("vm-run", name, "yes", stdout=os.open("/dev/null", os.O_WRONLY))
    pids = site.host.run(["pgrep", "-f", f"vm-run {name} yes"]).stdout.split()
    site.host.run(["kill", "-STOP", *pids])
    assert [site.vm_run(name, "echo", "x").stdout for _ in range(5)] == ["x\n"] * 5
    site.host.run(["kill", "-KILL", *pids], check=False)  # nsenter waits for it, stopped as it is
    site.host.run(["pkill", "-KILL", "-f", f"vm-run {name} yes"], check=False)
    flood.kill()
    flood.wait(10)


def test_commands_in_parallel_on_many_vms(site: Site) -> None:
    names = [site.define(wait=False) for _ in range(6)]
    for name in names:
        site.wait_for_socket(name)
    with ThreadPoolExecutor(len(names)) as pool:
        results = list(pool.map(lambda name: site.vm_run(name, "cat", "/tmp/guest/vmm").stdout, names))
    assert [int(pid) for pid in results] == [site.main_pid(name) for name in names]
