"""org.vmsilo1 from its client: results, errors, descriptors, signals, and what a hostile client tries."""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from bus.client import MANAGER, OBJECTS, PROPERTIES, ROOT, VM, BusError, Child, Client, as_user
from bus.conftest import OWNER, STRANGER, served
from vmsilod.bus.names import vm_path

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

ERROR = "org.vmsilo1.Error."
BUS_DENIED = "org.freedesktop.DBus.Error.AccessDenied"


@pytest.fixture
def server(stand_in: str) -> Iterator[subprocess.Popen[bytes]]:
    with served(stand_in, quiet_seconds=1) as child:
        yield child


@pytest.fixture
def client(stand_in: str, server: subprocess.Popen[bytes]) -> Iterator[Client]:
    assert server.poll() is None
    client = Client(stand_in)
    yield client
    client.con.close()


def open_fds(client: Client, child: subprocess.Popen[bytes]) -> int:
    """Counted after two more calls: by then GDBus has let go of the message before, with its descriptors."""
    for _ in range(2):
        client.manager("Check")
    return len(list(Path(f"/proc/{child.pid}/fd").iterdir()))


def resident_bytes(child: subprocess.Popen[bytes]) -> int:
    return int(Path(f"/proc/{child.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def read_stream(stream: Any) -> str:
    with socket.socket(fileno=stream.to_raw_fd()) as end:
        return end.recv(1 << 20).decode()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nothing", "NoSuchVm"),
        ("busy", "Busy"),
        ("refused", "StartFailed"),
        ("late", "Timeout"),
        ("broken", "ConfigBroken"),
        ("bug", "Failed"),
        ("exit", "Failed"),
        ("a b", "BadRequest"),
        ("", "BadRequest"),
        ("../x", "BadRequest"),
        ("n\n", "BadRequest"),
        ("x" * 64, "BadRequest"),
    ],
)
def test_each_failure_has_its_name(client: Client, name: str, error: str) -> None:
    assert client.error(ROOT, MANAGER, "Start", "sa{sv}", name, {}) == ERROR + error


def test_an_error_tells_fact_and_hint_but_nothing_of_a_bug(client: Client) -> None:
    with pytest.raises(BusError) as busy:
        client.manager("Kill", "s", "busy")
    assert busy.value.args[1] == "busy is being stopped\ntry again"
    with pytest.raises(BusError) as bug:
        client.manager("Kill", "s", "bug")
    assert "secret" not in bug.value.args[1]


@pytest.mark.parametrize(
    ("method", "signature", "body"),
    [
        ("Start", "sa{sv}", ("banking", {"wait": ("u", 1)})),
        ("Start", "sa{sv}", ("banking", {"nope": ("b", True)})),
        ("Stop", "sa{sv}", ("banking", {"timeout": ("i", -1)})),
        ("Run", "sasa{sv}", ("banking", [], {})),
        ("Run", "sasa{sv}", ("banking", ["true"], {"root": ("u", 1)})),
        ("Run", "sasa{sv}", ("banking", ["true"], {"rows": ("u", 24)})),
        ("Run", "sasa{sv}", ("banking", ["true"], {"env": ("a{ss}", {"A=B": "c"})})),
        ("Run", "sasa{sv}", ("banking", ["x" * 600_000], {})),
        ("OpenSsh", "sa{sv}", ("banking", {"root": ("u", 1)})),
        ("OpenSsh", "sa{sv}", ("banking", {"detach": ("b", True)})),
        ("Run", "sasa{sv}", ("banking", ["x" * 2_000_000], {})),
    ],
)
def test_a_broken_request_is_refused(
    client: Client, method: str, signature: str, body: tuple[Any, ...]
) -> None:
    assert client.error(ROOT, MANAGER, method, signature, *body) == ERROR + "BadRequest"


def test_what_is_not_declared_does_not_exist(client: Client) -> None:
    assert client.error(ROOT, MANAGER, "Explode") == "org.freedesktop.DBus.Error.UnknownMethod"
    assert client.error(ROOT, MANAGER, "read_properties", "s", VM) == (
        "org.freedesktop.DBus.Error.UnknownMethod"
    )
    assert client.error(ROOT, MANAGER, "Kill", "u", 3) == "org.freedesktop.DBus.Error.InvalidArgs"


def test_properties_can_be_read_but_not_written(client: Client) -> None:
    path = vm_path("my-work")
    assert path == f"{ROOT}/vm/my_2dwork"
    assert client.call(path, PROPERTIES, "Get", "ss", VM, "Memory") == ("u", 512)
    assert client.call(ROOT, PROPERTIES, "GetAll", "s", MANAGER) == {"Version": ("s", "1.2")}
    assert client.error(path, PROPERTIES, "Set", "ssv", VM, "Memory", ("u", 1))
    assert client.call(path, PROPERTIES, "Get", "ss", VM, "Memory") == ("u", 512)
    assert client.call(vm_path("bug"), PROPERTIES, "Get", "ss", VM, "Status") == ("s", "a?[31m?b")


def test_run_returns_a_stream_and_says_who_asked(stand_in: str, server: subprocess.Popen[bytes]) -> None:
    def run() -> str:
        options = {
            "env": ("a{ss}", {"A": "b"}),
            "rows": ("u", 24),
            "cols": ("u", 80),
            "no-start": ("b", True),
        }
        return read_stream(Client(stand_in).manager("Run", "sasa{sv}", "banking", ["ls", "-l"], options))

    assert server.poll() is None
    request = as_user(OWNER, run)
    assert f"uid={OWNER}, argv=('ls', '-l'), env=(('A', 'b'),)" in request
    assert "terminal=Terminal(rows=24, cols=80), root=False, detach=False, start=False" in request


def test_ssh_returns_stream_key_login_and_host_key(
    stand_in: str, server: subprocess.Popen[bytes], client: Client
) -> None:
    def login() -> tuple[str, bytes, str, str]:
        options = {"root": ("b", True), "no-start": ("b", True)}
        con = Client(stand_in)
        serial = con.send(ROOT, MANAGER, "OpenSsh", "sa{sv}", "banking", options)
        stream, key, name, host_key = con.body(serial)
        key_fd = key.to_raw_fd()
        return read_stream(stream), os.pread(key_fd, 100, 0), name, host_key

    before = open_fds(client, server)
    request, key, name, host_key = as_user(OWNER, login)
    assert request == f"SshRequest(name='banking', uid={OWNER}, root=True, start=False)"
    assert (key, name, host_key) == (b"private", "root", "ssh-ed25519 AAAA")
    assert open_fds(client, server) == before


def test_start_debug_hands_the_descriptors_over(client: Client, server: subprocess.Popen[bytes]) -> None:
    before = open_fds(client, server)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"console")
        unit = client.manager("StartDebug", "shhh", "banking", theirs, theirs, theirs)
        assert unit == "vmsilo-banking-debug.service"
        assert ours.recv(100) == b"CONSOLE"
        assert client.error(ROOT, MANAGER, "StartDebug", "shhh", "bug", ours, ours, ours) == ERROR + "Failed"
    assert open_fds(client, server) == before


def test_a_descriptor_that_is_not_there_is_a_broken_request(stand_in: str, client: Client) -> None:
    """jeepney would not send it: the index of a descriptor is put into the message by hand."""
    from gi.repository import Gio, GLib

    assert client.con
    flags = Gio.DBusConnectionFlags.AUTHENTICATION_CLIENT | Gio.DBusConnectionFlags.MESSAGE_BUS_CONNECTION
    con = Gio.DBusConnection.new_for_address_sync(stand_in, flags, None, None)
    for handle in (-1, 0, 7):
        args = GLib.Variant("(shhh)", ("banking", handle, handle, handle))
        with pytest.raises(GLib.Error, match="BadRequest"):
            con.call_sync(
                "org.vmsilo1", ROOT, MANAGER, "StartDebug", args, None, Gio.DBusCallFlags.NONE, 5000, None
            )
    con.close_sync(None)


def test_a_slow_call_holds_up_no_other(client: Client) -> None:
    slow = client.send(ROOT, MANAGER, "Run", "sasa{sv}", "banking", ["slow"], {})
    quick = client.send(ROOT, MANAGER, "List")
    assert client.result(quick)
    assert not client.has_result(slow)
    assert read_stream(client.result(slow))


def test_a_silent_authority_is_a_denial_and_holds_up_no_other(
    stand_in: str, server: subprocess.Popen[bytes]
) -> None:
    """Many more questions than polkit is asked at a time hang for one user; another user's calls pass."""
    read, write = os.pipe()

    def flood() -> list[str]:
        clients = [Client(stand_in), Client(stand_in)]
        hanging = [
            (client, client.send(ROOT, MANAGER, "Kill", "s", "zz")) for client in clients for _ in range(100)
        ]
        clients[1].call(ROOT, "org.freedesktop.DBus.Peer", "Ping")
        os.write(write, b"x")
        return [client.error_of(serial) for client, serial in hanging]

    flooding = Child(OWNER, flood)
    os.read(read, 1)
    root = Client(stand_in)
    for _ in range(5):
        root.manager("List")
    assert not flooding.is_done()
    assert flooding.result() == [ERROR + "Denied"] * 200
    assert server.poll() is None
    assert root.manager("List")
    os.close(read)
    os.close(write)


def test_open_prompts_are_few_per_user(stand_in: str, server: subprocess.Popen[bytes]) -> None:
    """Of three questions to a person one is refused, while two stay open; all end in a denial."""

    def ask() -> list[str]:
        client = Client(stand_in)
        serials = [client.send(ROOT, MANAGER, "Kill", "s", "banking", interactive=True) for _ in range(3)]
        texts = []
        for serial in serials:
            with pytest.raises(BusError) as error:
                client.result(serial)
            texts.append(error.value.args[1].splitlines()[0])
        return texts

    assert server.poll() is None
    assert sorted(as_user(STRANGER, ask)) == [
        "polkit does not answer",
        "polkit does not answer",
        "too many questions for a password are open",
    ]


def test_an_authority_that_fails_is_a_denial(client: Client) -> None:
    assert client.error(ROOT, MANAGER, "Kill", "s", "off") == ERROR + "Denied"


def test_without_an_authority_root_is_denied_too(lone_bus: str) -> None:
    with served(lone_bus):
        assert Client(lone_bus).error(ROOT, MANAGER, "List") == ERROR + "Denied"


def test_a_thousand_calls_leave_nothing_behind(client: Client, server: subprocess.Popen[bytes]) -> None:
    """Good ones, refused ones and bad ones, with descriptors that nobody asked for."""

    def round_of_calls() -> None:
        with open(os.devnull, "rb") as null:  # noqa: PTH123 - jeepney takes a file
            stray = {"wait": ("h", null)}
            # Already the bus refuses descriptors for a method that takes none.
            assert client.error(ROOT, MANAGER, "Start", "sa{sv}", "banking", stray) == BUS_DENIED
            assert client.error(ROOT, MANAGER, "StartDebug", "shhh", "a b", null, null, null)
        assert client.error(ROOT, MANAGER, "Start", "sa{sv}", "nothing", {}) == ERROR + "NoSuchVm"
        assert client.error(ROOT, MANAGER, "Start", "sa{sv}", "bug", {}) == ERROR + "Failed"
        client.manager("List")
        client.call(ROOT, OBJECTS, "GetManagedObjects")
        client.manager("Start", "sa{sv}", "banking", {})
        client.manager("Run", "sasa{sv}", "banking", ["true"], {}).close()

    for _ in range(25):
        round_of_calls()
    fds, memory = open_fds(client, server), resident_bytes(server)
    for _ in range(125):
        round_of_calls()
    assert open_fds(client, server) <= fds
    assert resident_bytes(server) - memory < 1 << 20


def test_a_hundred_vms_come_and_go(client: Client) -> None:
    before = client.call(ROOT, OBJECTS, "GetManagedObjects")
    assert vm_path("zz") in before
    assert client.manager("Reload") == ["broken.toml: memory is not a number"]
    objects = client.call(ROOT, OBJECTS, "GetManagedObjects")
    assert len(objects) == 100
    assert objects[vm_path("vm7")][VM]["DependsOn"] == ("as", ["banking"])
    assert len(client.manager("List")) == 100
    assert vm_path("zz") not in objects
    assert client.error(vm_path("zz"), VM, "Kill") == "org.freedesktop.DBus.Error.UnknownMethod"
    added = 100 - (len(before) - 1)
    members = [member for member, _ in client.signals(added + 2)]
    assert members == ["InterfacesRemoved"] + ["InterfacesAdded"] * added + ["ConfigurationReloaded"]


def test_changes_are_told_to_those_who_may_see_them(stand_in: str, server: subprocess.Popen[bytes]) -> None:
    from jeepney import MatchRule
    from jeepney.bus_messages import message_bus

    read, write = os.pipe()

    def listen(error: str) -> list[tuple[str, Any]]:
        client = Client(stand_in)
        client.con.send_and_get_reply(message_bus.AddMatch(MatchRule(type="signal", sender="org.vmsilo1")))
        assert client.error(ROOT, MANAGER, "List") == error
        os.write(write, b"x")
        return client.signals(2, seconds=2)

    listeners = [
        Child(OWNER, partial(listen, "")),
        Child(STRANGER, partial(listen, ERROR + "Denied")),
    ]
    for _ in listeners:
        os.read(read, 1)
    Client(stand_in).manager("Start", "sa{sv}", "banking", {})
    changed: tuple[str, Any] = ("PropertiesChanged", (VM, {"State": ("s", "running")}, []))
    state = ("VmStateChanged", ("banking", "running", ""))
    assert [listener.result() for listener in listeners] == [[changed, state], []]
    assert server.poll() is None
    os.close(read)
    os.close(write)


def test_the_name_cannot_be_taken_away(client: Client) -> None:
    from jeepney.bus_messages import message_bus

    replace_and_do_not_queue = 2 | 4
    reply = client.con.send_and_get_reply(message_bus.RequestName("org.vmsilo1", replace_and_do_not_queue))
    assert reply.body == (3,)  # the name exists
    assert client.manager("List")


def test_a_second_daemon_does_not_start(stand_in: str, server: subprocess.Popen[bytes]) -> None:
    assert server.poll() is None
    with pytest.raises(AssertionError, match="did not start"), served(stand_in):
        pass


def test_the_network_is_read_at_both_objects(client: Client) -> None:
    """Counters are 64 bits wide."""
    (port,) = client.manager("GetNetwork", "s", "banking")
    assert port["Tap"] == ("s", "banking-0")
    assert port["Received"] == ("t", 1 << 40)
    assert port["Denied"] == ("t", 3)
    assert port["Dropped"] == ("a{st}", {"mac": 1 << 40})
    assert (port["Type"], port["Network"]) == (("s", "tap"), ("s", "br0"))
    assert client.call(vm_path("banking"), VM, "GetNetwork") == [port]


def test_memory_is_read_and_asked_for_at_both_objects(client: Client) -> None:
    limits = {"configured": 512, "maximum": 1024}
    asked = {**limits, "requested": 768, "actual": 768}
    assert client.manager("GetMemory", "s", "banking") == limits
    assert client.manager("SetMemory", "su", "banking", 768) == asked
    assert client.call(vm_path("banking"), VM, "GetMemory") == limits
    assert client.call(vm_path("banking"), VM, "SetMemory", "u", 768) == asked
