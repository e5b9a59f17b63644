"""What a guest can and cannot see, and how its run ends."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hosts.container import Container

CONNECT_TO_AGENT = """
import socket
s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM); s.settimeout(10)
try:
    s.connect((1, 700)); s.sendall(b"x" * 100); print(s.recv(100))
except OSError as e: print("refused", e.errno)
"""


def in_guest(host: Container, *command: str, root: bool = False, check: bool = True) -> str:
    options = ["--root"] if root else []
    return host.run(["vm-run", *options, "demo", *command], user="user", check=check).stdout


def wait_for_state(host: Container, state: str, *, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while (now := host.vms()["demo"]["State"]) != state:
        assert time.monotonic() < deadline, f"still {now}, not {state}"
        time.sleep(0.2)


def test_the_secret_is_roots_alone(demo: Container) -> None:
    secret = in_guest(demo, "cat", "/run/vmsilo/secret", root=True).strip()
    assert len(secret) == 64
    assert in_guest(demo, "cat", "/run/vmsilo/secret", check=False) == ""
    assert secret not in in_guest(demo, "cat", "/proc/cmdline")
    assert secret not in demo.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout


def test_the_guests_users_cannot_use_the_agent(demo: Container) -> None:
    answer = in_guest(demo, "python3", "-c", CONNECT_TO_AGENT)
    assert "refused" in answer or answer == "b''\n"


def test_an_offline_guest_has_no_interface(demo: Container) -> None:
    assert in_guest(demo, "ls", "/sys/class/net").split() == ["lo"]


def test_the_vmm_is_confined(demo: Container) -> None:
    pid = demo.run("systemctl show -P MainPID vmsilo-demo-vm").stdout.strip()
    status = dict(
        line.split(":\t", 1)
        for line in demo.run(f"cat /proc/{pid}/status").stdout.splitlines()
        if ":\t" in line
    )
    assert status["Name"].startswith("qemu")
    assert int(status["Uid"].split()[0]) >= 1000
    assert {status[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert demo.run(f"nsenter -t {pid} -n ls /sys/class/net").stdout.split() == ["lo"]


def test_nothing_is_left_after_a_stop(demo: Container) -> None:
    in_guest(demo, "sh", "-c", "echo kept > marker; sync")
    demo.run(["vm-stop", "demo"], user="user")
    assert in_guest(demo, "sh", "-c", "cat marker 2>/dev/null || echo gone") == "gone\n"


def test_a_guest_that_powers_off_is_stopped(demo: Container) -> None:
    in_guest(demo, "systemctl", "poweroff", "--no-block", root=True, check=False)
    wait_for_state(demo, "stopped")
    assert demo.vms()["demo"]["LastResult"] == ""


def test_a_guest_that_reboots_answers_again(demo: Container) -> None:
    before = in_guest(demo, "cat", "/proc/sys/kernel/random/boot_id")
    in_guest(demo, "systemctl", "reboot", "--no-block", root=True, check=False)
    deadline = time.monotonic() + 120
    while True:
        done = demo.run(
            ["vm-run", "demo", "cat", "/proc/sys/kernel/random/boot_id"], user="user", check=False
        )
        if done.returncode == 0 and done.stdout != before:
            break
        assert time.monotonic() < deadline, done.stderr
    assert demo.vms()["demo"]["State"] == "running"


def test_a_panic_is_told(demo: Container) -> None:
    in_guest(demo, "sh", "-c", "echo c > /proc/sysrq-trigger", root=True, check=False)
    wait_for_state(demo, "failed")
    assert "panic" in demo.vms()["demo"]["LastResult"]


def test_a_killed_vmm_ends_its_commands_and_starts_again(demo: Container) -> None:
    client = demo.popen(
        ["vm-run", "demo", "sh", "-c", "echo up; sleep 600"],
        user="user",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert client.stdout is not None
    assert client.stdout.readline() == b"up\n"
    demo.run("systemctl kill -s KILL --kill-whom=main vmsilo-demo-vm")
    _, errors = client.communicate(timeout=60)
    assert client.returncode == 125
    assert errors.startswith(b"vm-run: ")
    wait_for_state(demo, "failed")
    assert in_guest(demo, "echo", "again") == "again\n"


def test_debug_start_shows_the_boot(host: Container) -> None:
    host.run(["vm-stop", "demo"], user="user", check=False)
    console = host.popen(
        ["script", "-qec", "vm-start-debug demo", "/dev/null"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert console.stdin is not None
    assert console.stdout is not None
    shown = b""
    while b"vmsilo-agent" not in shown:
        line = console.stdout.readline()
        assert line, shown[-2000:]
        shown += line
    console.stdin.write(b"\x1d")
    console.stdin.flush()
    console.communicate(timeout=60)
    assert b"\x1b]" not in shown
    assert host.vms()["demo"]["State"] == "stopped"
    assert host.run(["vm-run", "demo", "echo", "back"], user="user").stdout == "back\n"
