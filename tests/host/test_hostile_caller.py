"""Another user of the host, and an owner who means harm: what they reach, and what they cannot break."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hosts.layers import USER
from hosts.standin.site import unit

if TYPE_CHECKING:
    from hosts.standin.site import Site

VENV_PYTHON = "/usr/local/lib/vmsilo/venv/bin/python3"
MALLORY = "mallory"
MANAGER = ("busctl", "call", "org.vmsilo1", "/org/vmsilo1", "org.vmsilo1.Manager")

ASK_CONTROL = """
import json, os, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.settimeout(10)
sock.connect("/run/vmsilo/control.sock")
try:
    sock.send(json.dumps({"op": sys.argv[1], "name": sys.argv[2], "invocation": "0" * 32}).encode())
    print(socket.recv_fds(sock, 65536, 16)[:2])
except (BrokenPipeError, ConnectionResetError):
    print((b"", []))
"""

# Makes, below the cgroup that was delegated to it, one with the name of a VM's unit.
POSE_AS_UNIT = """
import os, pathlib, sys
lines = open("/proc/self/cgroup").read().splitlines()
for line in lines:
    number, controllers, path = line.split(":", 2)
    for top in ("/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"):
        own = pathlib.Path(top + path)
        if path != "/" and (own / "cgroup.procs").exists():
            posed = own / sys.argv[3]
            posed.mkdir(exist_ok=True)
            (posed / "cgroup.procs").write_text(str(os.getpid()))
print(open("/proc/self/cgroup").read())
"""


def call(site: Site, *arguments: str, user: str = MALLORY) -> str:
    """The error of a bus call, "" for success."""
    done = site.host.run(["busctl", "call", "--timeout=20", *arguments], user=user, check=False)
    return done.stderr.strip() if done.returncode else ""


def test_another_user_cannot_run_commands(site: Site) -> None:
    name = site.running()
    done = site.vm_run(name, "true", user=MALLORY)
    assert done.returncode == 125
    assert done.stderr.startswith(f"vm-run: VM '{name}' belongs to another user\n")
    done = site.vm_run("--root", name, "true", user=MALLORY)
    assert done.returncode == 125
    assert "not allowed" in done.stderr


@pytest.mark.parametrize(
    "path", ["relay.sock", "vm/{}/monitor.sock", "vm/{}/vsock/vsock", "{}-command.socket"]
)
def test_another_user_cannot_connect(site: Site, path: str) -> None:
    name = site.running()
    for kind in ("SOCK_SEQPACKET", "SOCK_STREAM"):
        attempt = (
            f"import socket as s; s.socket(s.AF_UNIX, s.{kind}).connect('/run/vmsilo/{path.format(name)}')"
        )
        done = site.host.run(["python3", "-c", attempt], user=MALLORY, check=False)
        assert "PermissionError" in done.stderr


@pytest.mark.parametrize("user", [MALLORY, USER, "root"])
@pytest.mark.parametrize("op", ["prepare", "stop"])
def test_nobody_but_a_launcher_gets_an_answer_at_the_control_socket(site: Site, user: str, op: str) -> None:
    name = site.running()
    done = site.host.run(["python3", "-c", ASK_CONTROL, op, name], user=user)
    assert done.stdout == "(b'', [])\n"
    assert site.state(name) == "running"


@pytest.mark.parametrize("op", ["prepare", "stop"])
def test_a_delegated_cgroup_with_the_name_of_a_unit_is_not_that_unit(site: Site, op: str) -> None:
    name = site.running()
    argv = ["systemd-run", "-q", "--pipe", "--wait", "--uid=mallory", "-p", "Delegate=yes", "python3", "-c"]
    done = site.host.run([*argv, POSE_AS_UNIT + ASK_CONTROL, op, name, unit(name)])
    assert f"/{unit(name)}\n" in done.stdout, done.stdout  # the pose itself worked
    assert done.stdout.splitlines()[-1] == "(b'', [])", done.stdout
    assert site.state(name) == "running"


def test_a_vmm_gets_no_second_preparation_and_nothing_of_another_vm(site: Site) -> None:
    name, other = site.running(), site.running()
    program = ASK_CONTROL.replace('"0" * 32', "sys.argv[3]")
    invocation = site.unit(name, "InvocationID")["InvocationID"]
    for target in (name, other):
        done = site.vm_run(name, "python3", "-c", program, "prepare", target, invocation)
        assert '"error"' in done.stdout, done
        assert done.stdout.endswith(", [])\n")
    done = site.vm_run(name, "python3", "-c", program, "stop", other, "")
    assert '"error"' in done.stdout
    assert site.state(name) == site.state(other) == "running"


def test_bus_calls_of_another_user_are_denied(site: Site) -> None:
    name = site.running()
    vm = ("org.vmsilo1", f"/org/vmsilo1/vm/{name}")
    manager = ("org.vmsilo1", "/org/vmsilo1", "org.vmsilo1.Manager")
    calls: list[tuple[str, ...]] = [
        (*manager, "List"),
        (*manager, "Start", "sa{sv}", name, "0"),
        (*manager, "Stop", "sa{sv}", name, "0"),
        (*manager, "Kill", "s", name),
        (*manager, "Restart", "sa{sv}", name, "0"),
        (*manager, "Run", "sasa{sv}", name, "1", "true", "0"),
        (*manager, "Run", "sasa{sv}", name, "1", "true", "1", "root", "b", "true"),
        (*manager, "Reload"),
        (*manager, "Check"),
        (*vm, "org.vmsilo1.VM", "Start", "a{sv}", "0"),
        (*vm, "org.vmsilo1.VM", "Stop", "a{sv}", "0"),
        (*vm, "org.vmsilo1.VM", "Kill"),
        (*vm, "org.vmsilo1.VM", "Restart", "a{sv}", "0"),
        (*vm, "org.vmsilo1.VM", "Run", "asa{sv}", "1", "true", "0"),
        (*vm, "org.freedesktop.DBus.Properties", "GetAll", "s", "org.vmsilo1.VM"),
        (*vm, "org.freedesktop.DBus.Properties", "Get", "ss", "org.vmsilo1.VM", "State"),
        (*vm, "org.freedesktop.DBus.Properties", "Set", "ssv", "org.vmsilo1.VM", "State", "s", "x"),
        ("org.vmsilo1", "/org/vmsilo1", "org.freedesktop.DBus.ObjectManager", "GetManagedObjects"),
        ("org.vmsilo1", "/org/vmsilo1/vm", "org.freedesktop.DBus.Introspectable", "Introspect"),
    ]
    for arguments in calls:
        error = call(site, *arguments)
        assert error, arguments
        assert name not in error.replace(f"/{name}", ""), arguments
    assert site.state(name) == "running"
    assert site.host.run(["vmsilo", "list"], user=MALLORY, check=False).stdout == ""


def test_a_start_in_debug_needs_more_than_the_owner(site: Site) -> None:
    name = site.define()
    for user in (MALLORY, USER):
        done = site.host.run(["vm-start-debug", name], user=user, check=False)
        assert done.returncode == 1
        assert "not allowed" in done.stderr


def test_signals_are_not_for_another_user(site: Site) -> None:
    spy = site.spawn(
        "timeout", "4", "dbus-monitor", "--system", "sender=org.vmsilo1", user=MALLORY, stdout=-1, stderr=-1
    )
    name = site.running()
    out, _ = spy.communicate(timeout=20)
    assert b"NameAcquired" in out  # it does hear what is for it
    assert name.encode() not in out


@pytest.mark.parametrize("name", ["../x", "a/b", "a\nb", "", "x" * 300, "vmsilo-x", "a;b", "é"])
def test_odd_names_over_the_bus(site: Site, name: str) -> None:
    for method in (
        ("Start", "sa{sv}", name, "0"),
        ("Kill", "s", name),
        ("Run", "sasa{sv}", name, "1", "true", "0"),
    ):
        error = call(site, *MANAGER[2:], *method, user=USER)
        assert "not a VM name" in error or "no VM" in error, error


def test_a_huge_request_is_refused(site: Site) -> None:
    name = site.running()
    program = f"""
import sys
from jeepney import DBusAddress, new_method_call
from jeepney.io.blocking import open_dbus_connection
address = DBusAddress("/org/vmsilo1", bus_name="org.vmsilo1", interface="org.vmsilo1.Manager")
with open_dbus_connection("SYSTEM") as con:
    for size in (600 * 1024, 5 * 1024 * 1024):
        call = new_method_call(address, "Run", "sasa{{sv}}", ("{name}", ["x" * size], {{}}))
        print(con.send_and_get_reply(call, timeout=30).body[0].splitlines()[0])
    call = new_method_call(address, "Run", "sasa{{sv}}", ("{name}", ["x"] * 200000, {{}}))
    print(con.send_and_get_reply(call, timeout=30).body[0].splitlines()[0])
"""
    done = site.host.run([VENV_PYTHON, "-c", program], user=USER)
    assert done.stdout.splitlines()[0] == "command and environment are larger than 512 KiB"
    assert all("larger than" in line for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == 3
    assert site.vm_run(name, "echo", "fine").stdout == "fine\n"


def test_a_thousand_idle_connections_of_the_owner(site: Site) -> None:
    name, other = site.running(), site.running()
    program = f"""
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
socks = []
for _ in range(1000):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect("/run/vmsilo/{name}-command.socket")
    socks.append(sock)
print("connected", flush=True)
sys.stdin.read()
"""
    idle = site.spawn("python3", "-c", program, stdin=-1, stdout=-1)
    assert idle.stdout is not None
    assert idle.stdout.readline() == b"connected\n"
    assert site.vm_run(other, "echo", "fine", timeout=10).stdout == "fine\n"  # at once
    site.host.wait_until(f"vm-run {name} true", seconds=20)  # as soon as the idle ones are thrown out
    idle.communicate(b"")


def test_garbage_at_the_command_socket(site: Site) -> None:
    name = site.running()
    program = f"""
import socket
requests = [b"x", b"{{}}", b"[]", b"[" * 4000, b"x" * 100000]
requests.append(b'{{"v":1,"op":"connect","wait":-1}}')
requests.append(b'{{"v":2,"op":"connect","wait":1}}')
requests.append(b'{{"v":1,"op":"connect","wait":1,"role":"root"}}')
for data in requests:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect("/run/vmsilo/{name}-command.socket")
    sock.settimeout(10)
    sock.send(data)
    reply, fds, _, _ = socket.recv_fds(sock, 4096, 4)
    assert b'"error"' in reply and not fds, (data[:50], reply)
"""
    site.host.run(["python3", "-c", program], user=USER)
    assert site.vm_run(name, "echo", "fine").stdout == "fine\n"
