"""Waiting for systemd's jobs, against a stand-in service manager on a private bus."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from gi.repository import Gio, GLib
from vmsilod import loop, systemd

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future
    from pathlib import Path

JOB = f"{systemd.PATH}/job/7"
BUS_CONFIG = """
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path={path}</listen><policy context="default">
<allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/></policy></busconfig>
"""
# Answers two starts with one job, whose end it reports between the two replies.
SERVICE_MANAGER = """
import sys
from gi.repository import Gio, GLib
address, job = sys.argv[1:]
NODE = Gio.DBusNodeInfo.new_for_xml('''<node><interface name="org.freedesktop.systemd1.Manager">
<method name="StartUnit">
<arg type="s" direction="in"/><arg type="s" direction="in"/><arg type="o" direction="out"/>
</method>
<signal name="JobRemoved"><arg type="u"/><arg type="o"/><arg type="s"/><arg type="s"/></signal>
</interface></node>''')
waiting = []
def finish():
    removed = GLib.Variant("(uoss)", (7, job, "x.service", "done"))
    con.emit_signal(None, "/org/freedesktop/systemd1", NODE.interfaces[0].name, "JobRemoved", removed)
    waiting[1].return_value(GLib.Variant("(o)", (job,)))
def call(con, sender, path, interface, method, args, invocation):
    waiting.append(invocation)
    if len(waiting) == 2:
        waiting[0].return_value(GLib.Variant("(o)", (job,)))
        GLib.timeout_add(100, finish)
flags = Gio.DBusConnectionFlags.AUTHENTICATION_CLIENT | Gio.DBusConnectionFlags.MESSAGE_BUS_CONNECTION
con = Gio.DBusConnection.new_for_address_sync(address, flags, None, None)
con.register_object("/org/freedesktop/systemd1", NODE.interfaces[0], call, None, None)
bus = "org.freedesktop.DBus"
own = GLib.Variant("(su)", ("org.freedesktop.systemd1", 4))
con.call_sync(bus, "/org/freedesktop/DBus", bus, "RequestName", own, None, 0, -1, None)
print("ready", flush=True)
GLib.MainLoop().run()
"""


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "bus"
    (tmp_path / "bus.conf").write_text(BUS_CONFIG.format(path=path))
    argv = ["dbus-daemon", f"--config-file={tmp_path / 'bus.conf'}", "--nofork", "--print-address"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        try:
            yield daemon.stdout.readline().strip()
        finally:
            daemon.terminate()


def test_two_callers_of_one_job_both_hear_its_end(bus: str) -> None:
    argv = [sys.executable, "-c", SERVICE_MANAGER, bus, JOB]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as manager:
        try:
            assert manager.stdout is not None
            assert manager.stdout.readline() == "ready\n"
            flags = Gio.DBusConnectionFlags
            con = Gio.DBusConnection.new_for_address_sync(
                bus, flags.AUTHENTICATION_CLIENT | flags.MESSAGE_BUS_CONNECTION, None, None
            )
            client = systemd.Systemd(con, lambda _unit: None)
            results: list[Future[str]] = [loop.spawn(client.start("x.service")) for _ in range(2)]
            main_loop = GLib.MainLoop()
            for future in results:
                future.add_done_callback(lambda _: all(f.done() for f in results) and main_loop.quit())
            GLib.timeout_add(10_000, main_loop.quit)
            main_loop.run()
            assert [future.result(0) for future in results] == ["done", "done"]
            client.close()
            con.close_sync(None)
        finally:
            manager.kill()


class Subscriptions:
    """Of a connection: the handlers by member."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}

    def signal_subscribe(self, _name: str, _interface: str, member: str, *rest: Any) -> int:
        self.handlers[member] = rest[-1]
        return 1

    def tell(self, unit: str, **properties: Any) -> None:
        values = {
            key: GLib.Variant("s" if isinstance(value, str) else "t", value)
            for key, value in properties.items()
        }
        args = GLib.Variant("(sa{sv}as)", (systemd.UNIT, values, []))
        self.handlers["PropertiesChanged"](None, None, systemd.unit_path(unit), None, None, args)


def test_a_signal_that_says_nothing_new_of_a_unit_is_passed_over() -> None:
    """systemd sends one whenever a guest has its status text changed."""
    told: list[str] = []
    con = Subscriptions()
    client = systemd.Systemd(con, told.append)
    state = {
        "ActiveState": "active",
        "SubState": "running",
        "InvocationID": "x",
        "StateChangeTimestampMonotonic": 1,
    }
    con.tell("a.service", **state)
    assert told == []
    client.follow("a.service")
    con.tell("a.service", **state)
    con.tell("a.service", **state)
    assert told == ["a.service"]
    con.tell("a.service", **state | {"StateChangeTimestampMonotonic": 2})
    con.tell("a.service", ActiveState="active")  # not all of it: who knows
    con.tell("a.service", ActiveState="active")
    assert told == ["a.service"] * 4


def test_unit_paths_are_encoded_as_systemd_does() -> None:
    # systemd-escape has no verb for it; this is what `busctl tree org.freedesktop.systemd1` shows.
    assert systemd.unit_path("vmsilo-a1-vm.service") == f"{systemd.PATH}/unit/vmsilo_2da1_2dvm_2eservice"
