"""Commands in a real guest: streams, status, signals, terminal, environment, users."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hosts.container import Container

MEGABYTES = 8


def vm_run(host: Container, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return host.run(["vm-run", *command], user="user", check=check)


def test_cold_start_runs_the_command(host: Container) -> None:
    host.run(["vm-stop", "demo"], user="user")
    assert host.vms()["demo"]["State"] == "stopped"
    done = vm_run(host, "demo", "uname", "-n")
    assert (done.stdout, done.stderr) == ("demo\n", "")
    assert host.vms()["demo"]["State"] == "running"


def test_streams_are_kept_apart(demo: Container) -> None:
    done = vm_run(demo, "demo", "sh", "-c", "echo out; echo err >&2")
    assert (done.stdout, done.stderr) == ("out\n", "err\n")


def test_bytes_arrive_unchanged_both_ways(demo: Container) -> None:
    data = random.Random(1).randbytes(MEGABYTES << 20)
    argv = demo.argv(["vm-run", "demo", "cat"], user="user")
    done = subprocess.run(argv, input=data, capture_output=True, check=True, timeout=300)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


def test_exit_status_and_signals(demo: Container) -> None:
    assert vm_run(demo, "demo", "sh", "-c", "exit 42", check=False).returncode == 42
    assert vm_run(demo, "demo", "sh", "-c", "kill -KILL $$", check=False).returncode == 128 + signal.SIGKILL
    missing = vm_run(demo, "demo", "no-such-program", check=False)
    assert missing.returncode == 127
    assert missing.stderr.startswith("vm-run: ")
    assert vm_run(demo, "demo", "/etc/passwd", check=False).returncode == 126


def test_a_signal_to_the_client_reaches_the_command(demo: Container) -> None:
    script = 'trap "echo got TERM; exit 3" TERM; echo ready; while :; do sleep 0.1; done'
    client = demo.popen(["vm-run", "demo", "sh", "-c", script], user="user", stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"ready\n"
    demo.run("pkill -TERM -u user -f 'bin/vm-run demo sh'")
    assert client.stdout.read() == b"got TERM\n"
    assert client.wait(60) == 3


def test_a_dead_client_takes_its_command_with_it(demo: Container) -> None:
    script = "setsid sleep 987 & sleep 986 & echo ready; wait"
    client = demo.popen(["vm-run", "demo", "sh", "-c", script], user="user", stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"ready\n"
    assert vm_run(demo, "demo", "pgrep", "-c", "-x", "sleep").stdout == "2\n"
    demo.run("pkill -KILL -u user -f 'bin/vm-run demo sh'")
    client.wait(60)
    deadline = time.monotonic() + 30
    while vm_run(demo, "demo", "pgrep", "-x", "sleep", check=False).returncode == 0:
        assert time.monotonic() < deadline, "the command outlives its client"


def test_a_detached_command_survives(demo: Container) -> None:
    vm_run(demo, "--detach", "demo", "sleep", "985")
    try:
        assert vm_run(demo, "demo", "pgrep", "-f", "sleep 985").stdout
    finally:
        vm_run(demo, "demo", "pkill", "-f", "sleep 985")


def test_users_and_environment(demo: Container) -> None:
    shown = vm_run(demo, "demo", "sh", "-c", "id -un; pwd; echo $HOME $XDG_RUNTIME_DIR; echo $SECRET")
    assert shown.stdout == "user\n/home/user\n/home/user /run/user/1000\n\n"
    assert vm_run(demo, "--root", "demo", "id", "-u").stdout == "0\n"
    assert (
        vm_run(demo, "--cwd", "/usr", "--env", "A=b c", "demo", "sh", "-c", "pwd; echo $A").stdout
        == "/usr\nb c\n"
    )


def test_the_users_session_is_there(demo: Container) -> None:
    assert vm_run(demo, "demo", "systemctl", "--user", "is-active", "basic.target").stdout == "active\n"
    bus = vm_run(demo, "demo", "sh", "-c", "test -S ${DBUS_SESSION_BUS_ADDRESS#unix:path=} && echo there")
    assert bus.stdout == "there\n"


def test_a_terminal_has_size_and_filter(demo: Container) -> None:
    """script(1) gives the client a terminal of its own."""
    hostile = 'stty size; test -t 0 && echo tty; printf "\\033]0;evil\\007ok\\033[31m"'
    inner = f"stty rows 31 cols 97; vm-run demo sh -c '{hostile}'"
    done = demo.run(["script", "-qec", inner, "/dev/null"], user="user")
    assert "31 97" in done.stdout
    assert "tty" in done.stdout
    assert "\x1b]0;" not in done.stdout
    assert "ok\x1b[31m" in done.stdout


def test_many_at_once(demo: Container) -> None:
    script = "for i in $(seq 20); do vm-run demo echo $i & done; wait"
    numbers = demo.run(["bash", "-c", script], user="user").stdout.split()
    assert sorted(numbers, key=int) == [str(number) for number in range(1, 21)]


def test_the_client_needs_no_terminal_or_descriptors(demo: Container) -> None:
    done = demo.run(["bash", "-c", "vm-run demo echo fine <&-"], user="user")
    assert done.stdout == "fine\n"
    assert os.strerror(0)  # nothing of the host's descriptors is asked for
