"""org.vmsilo1 as programs see it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from hosts.layers import USER

if TYPE_CHECKING:
    from hosts.standin.site import Site

OBJECTS = "org.freedesktop.DBus.ObjectManager"
VENV_PYTHON = "/usr/local/lib/vmsilo/venv/bin/python3"
MANAGER = ("org.vmsilo1", "/org/vmsilo1", "org.vmsilo1.Manager")

WATCH = """
import json, sys, time
from jeepney import DBusAddress, MatchRule, new_method_call
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import open_dbus_connection
with open_dbus_connection("SYSTEM") as con:
    con.send_and_get_reply(message_bus.AddMatch(MatchRule(type="signal", sender="org.vmsilo1")))
    root = DBusAddress("/org/vmsilo1", bus_name="org.vmsilo1", interface="org.vmsilo1.Manager")
    con.send_and_get_reply(new_method_call(root, "List"))
    print("ready", flush=True)
    while True:
        message = con.receive()
        fields = {key.name: value for key, value in message.header.fields.items()}
        if fields["member"] == "NameAcquired":
            continue
        print(json.dumps([fields["path"], fields["member"], message.body]), flush=True)
"""


def call(site: Site, *arguments: str, user: str = USER) -> str:
    done = site.host.run(["busctl", "call", "--timeout=60", *arguments], user=user, check=False)
    return done.stderr.strip() if done.returncode else ""


def test_changes_are_signalled(site: Site) -> None:
    watch = site.spawn("timeout", "60", VENV_PYTHON, "-c", WATCH, "watch-signals", stdout=-1)
    assert watch.stdout is not None
    assert watch.stdout.readline() == b"ready\n"
    name = site.define()
    site.vm_run(name, "true")
    site.wait_for_state(name, "running")
    site.host.run(["vm-stop", name], user=USER)
    site.host.run(["rm", f"/etc/vmsilo/vms.d/{name}.toml"])
    path = f"/org/vmsilo1/vm/{name}"
    seen: list[tuple[str, str, list[object]]] = []
    while not seen or seen[-1][1] != "InterfacesRemoved":
        seen.append(tuple(json.loads(watch.stdout.readline())))
    site.host.run(["pkill", "-f", "watch-signals$"])
    watch.communicate(timeout=10)
    assert [body[0] for _, member, body in seen if member == "InterfacesAdded"] == [path]
    states = [body[1] for _, member, body in seen if member == "VmStateChanged" and body[0] == name]
    assert states == ["starting", "running", "stopping", "stopped"]
    changed = [body[1] for where, member, body in seen if member == "PropertiesChanged" and where == path]
    merged = [key for properties in changed if isinstance(properties, dict) for key in properties]
    assert {"State", "Pid", "Uid", "Since"} <= set(merged)
    assert seen[-1][2][0] == path


def test_the_object_manager_has_every_vm(site: Site) -> None:
    name = site.running()
    out = site.host.run(
        f"busctl --json=short call org.vmsilo1 /org/vmsilo1 {OBJECTS} GetManagedObjects",
        user=USER,
    ).stdout
    objects = json.loads(out)["data"][0]
    properties = objects[f"/org/vmsilo1/vm/{name}"]["org.vmsilo1.VM"]
    assert properties["State"]["data"] == "running"
    assert properties["Vmm"]["data"] == "qemu"
    assert properties["Cid"]["data"] == 3


def test_errors_have_names(site: Site) -> None:
    site.expect("QEMU could not start the VM")
    name = site.define(mode="exit-1")
    program = f"""
from jeepney import DBusAddress, HeaderFields, new_method_call
from jeepney.io.blocking import open_dbus_connection
root = DBusAddress("/org/vmsilo1", bus_name="org.vmsilo1", interface="org.vmsilo1.Manager")
with open_dbus_connection("SYSTEM") as con:
    for method, signature, body in (
        ("Start", "sa{{sv}}", ("no-such-vm", {{}})),
        ("Start", "sa{{sv}}", ("{name}", {{"nonsense": ("b", True)}})),
        ("Start", "sa{{sv}}", ("{name}", {{}})),
        ("Run", "sasa{{sv}}", ("{name}", ["true"], {{"no-start": ("b", True)}})),
        ("Run", "sasa{{sv}}", ("{name}", [], {{}})),
        ("Reload", None, ()),
    ):
        reply = con.send_and_get_reply(new_method_call(root, method, signature, body), timeout=60)
        print(reply.header.fields.get(HeaderFields.error_name))
"""
    names = site.host.run([VENV_PYTHON, "-c", program], user=USER).stdout.splitlines()
    short = [text.removeprefix("org.vmsilo1.Error.") for text in names]
    assert short == ["NoSuchVm", "BadRequest", "StartFailed", "NotRunning", "BadRequest", "Denied"]


def test_a_call_starts_vmsilod(site: Site) -> None:
    name = site.running()
    site.host.run("systemctl stop vmsilod.service")
    assert site.show(name)["State"] == "running"
    assert not site.host.run("systemctl -q is-active vmsilod.service", check=False).returncode


def test_without_polkit_calls_are_denied_and_commands_work(site: Site) -> None:
    name = site.running()
    assert not call(site, *MANAGER, "List")
    site.host.run("systemctl mask --now --runtime polkit.service")
    try:
        begin = time.monotonic()
        error = call(site, *MANAGER, "Stop", "sa{sv}", name, "0")
        assert error
        assert time.monotonic() - begin < 30
        assert site.vm_run(name, "echo", "works").stdout == "works\n"
        assert call(site, *MANAGER, "List", user="root")  # whatever goes wrong while asking is a denial
    finally:
        site.host.run("systemctl unmask --runtime polkit.service && systemctl start polkit.service")
    site.host.wait_until(
        "busctl --timeout=5 call org.vmsilo1 /org/vmsilo1 org.vmsilo1.Manager List", seconds=20
    )
    assert site.state(name) == "running"


def test_a_slow_start_does_not_block_other_calls(site: Site) -> None:
    slow = site.define('kernel_params = ["standin.delay=3"]')
    start = site.spawn("vm-start", "--wait", slow)
    site.wait_for_state(slow, "starting")
    begin = time.monotonic()
    for _ in range(5):
        site.host.vms()
    assert time.monotonic() - begin < 2
    assert start.wait(30) == 0


def test_calls_for_one_vm_at_the_same_time(site: Site) -> None:
    """Starts and stops of several callers end in a state that is one of both, with nothing left over."""
    name = site.define()
    callers = []
    for _ in range(4):
        callers += [site.spawn("vm-start", name, stderr=-1), site.spawn("vm-stop", name, stderr=-1)]
    for caller in callers:
        caller.communicate(timeout=60)
    assert site.wait_for_state(name, "running", "stopped")
    assert site.vm_run(name, "echo", "fine").stdout == "fine\n"
