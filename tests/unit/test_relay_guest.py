"""What a guest says to relayd, friendly and hostile, over the real host-port listener."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest
from relay_host import SECRET, Control, RelayHost, run_host, wait_until
from vmsilo_relay.context import Context, Limits
from vmsilo_relay.hostport import parse_message
from vmsilo_relay.journal import Journal
from vmsilo_relay.loop import Loop
from vmsilo_relay.record import KernelChannel, Record
from vmsilo_relay.relay import Relay
from vmsilo_relay.systemd import Notifier

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def host(tmp_path: Path) -> Iterator[RelayHost]:
    with run_host(tmp_path) as host:
        yield host


@pytest.fixture
def control(host: RelayHost) -> Control:
    control = host.start("message_seconds=0.3", "publish_seconds=0.01")
    assert host.add(control) == {"ok": True}
    return control


def vm_of(control: Control) -> dict[str, Any]:
    found: dict[str, Any] = control.call("list")["vms"][0]
    return found


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (b"STATUS=plain", "plain"),
        (b"STATUS=\x1b[2Jcleared\x07\x00", "?[2Jcleared??"),
        ("STATUS=Grüße…".encode(), "Gr??e?"),
        (b"STATUS=\xff\xfe", "??"),
        (b"STATUS=" + b"x" * 500, "x" * 120),
        (b"X_SYSTEMD_UNIT_ACTIVE=multi-user.target", "reached multi-user.target"),
        (b"X_SYSTEMD_UNIT_ACTIVE=\x1b]0;x", None),
        (b"X_SYSTEMD_SHUTDOWN=reboot", "shutting down (reboot)"),
        (b"FDSTORE=1\nMAINPID=1\nSTATUS", None),
        (b"\n\n=\n==\x00", None),
    ],
)
def test_only_printable_text_is_taken(message: bytes, status: str | None) -> None:
    parsed = parse_message(message)
    assert parsed.status == status
    assert not parsed.ready
    assert not parsed.agent


def test_events_reach_a_subscriber_in_order(host: RelayHost, control: Control) -> None:
    subscriber = host.control()
    assert subscriber.call("subscribe") == {"ok": True}
    host.say(b"STATUS=booting on")
    events = [subscriber.receive()[0]]
    host.say(b"X_VMSILO_AGENT=1\nX_VMSILO_READY_FROM=systemd")
    host.say(b"READY=1")
    events += [subscriber.receive()[0] for _ in range(2)]
    assert events == [
        {"event": kind, "name": "banking", "generation": "g1", "text": "booting on"}
        for kind in ("status", "agent", "ready")
    ]
    assert vm_of(control) == {
        "name": "banking",
        "generation": "g1",
        "ready": True,
        "agent": True,
        "status": "booting on",
    }


def test_guest_that_rebooted_in_place_stays_ready(host: RelayHost, control: Control) -> None:
    host.make_ready()
    host.say(b"X_VMSILO_AGENT=1")
    assert vm_of(control)["ready"]
    host.say(b"READY=1")
    assert vm_of(control)["ready"]


@pytest.mark.parametrize("goodbye", [b"X_VMSILO_AGENT=0", b"X_SYSTEMD_SHUTDOWN=reboot"])
def test_a_guest_that_goes_down_is_not_connected_to(
    host: RelayHost, control: Control, goodbye: bytes
) -> None:
    host.make_ready()
    subscriber = host.control()
    subscriber.call("subscribe")
    host.say(goodbye)
    assert not vm_of(control)["ready"]
    while subscriber.receive()[0]["event"] != "down":
        pass
    host.make_ready()
    assert vm_of(control)["ready"]


def test_a_guest_that_changes_its_mind_without_end_is_told_of_seldom(host: RelayHost) -> None:
    control = host.start("settle_seconds=0.2")
    assert host.add(control) == {"ok": True}
    subscriber = host.control()
    subscriber.call("subscribe")
    for _ in range(50):
        host.say(b"X_VMSILO_AGENT=1\nREADY=1")
        host.say(b"X_VMSILO_AGENT=0")
    host.say(b"X_VMSILO_AGENT=1")
    events = [subscriber.receive()[0]["event"]]
    while events[-1] != "ready" or not vm_of(control)["ready"]:
        events.append(subscriber.receive()[0]["event"])
    assert len(events) < 20


def test_garbage_changes_nothing(host: RelayHost, control: Control) -> None:
    before = vm_of(control)
    for junk in (b"\0" * 4096, os.urandom(2000).replace(b"=", b""), b"=" * 4000, b"READY=1" + b"x" * 4089):
        host.say(junk)
    assert vm_of(control) == before


def test_a_megabyte_is_cut_off(host: RelayHost, control: Control) -> None:
    with host.speak() as sock, contextlib.suppress(OSError):
        sock.sendall(b"READY=1\nX_VMSILO_AGENT=1\n" + b"x" * (1 << 20))
        sock.recv(1)
    wait_until(lambda: not vm_of(control)["ready"], "an answer")


def test_silent_guest_is_cut_off_in_time(host: RelayHost, control: Control) -> None:
    with host.speak() as sock:
        start = time.monotonic()
        assert sock.recv(1) == b""
        assert time.monotonic() - start < 2
    assert not vm_of(control)["agent"]


def test_flooding_guest_takes_no_other_guests_place(host: RelayHost, control: Control) -> None:
    host.add(control, "work")
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(host.speak())
        wait_until(lambda: host.count_fds() > host.baseline + 16, "the flood")
        assert host.count_fds() < host.baseline + 40
        host.make_ready("work")
    ready = {vm["name"]: vm["ready"] for vm in control.call("list")["vms"]}
    assert ready == {"banking": False, "work": True}


def test_status_flood_is_thinned_out(host: RelayHost) -> None:
    control = host.start("publish_seconds=0.2")
    host.add(control)
    subscriber = host.control()
    subscriber.call("subscribe")
    for number in range(500):
        host.say(b"STATUS=%d" % number)
    heard: list[str] = []
    while not heard or heard[-1] != "499":
        heard.append(subscriber.receive()[0]["text"])
    assert len(heard) < 100


def test_shared_listener_knows_guests_by_cid(tmp_path: Path) -> None:
    """The kernel's listener needs a kernel with vhost-vsock; what is behind accept does not."""
    loop, journal = Loop(), Journal()
    context = Context(loop, journal, Limits())
    relay = Relay(context, Notifier(loop, journal, {}), str(tmp_path))
    for name, cid in (("banking", 7), ("work", 8)):
        relay.add(Record(name, "g", SECRET, 1000, KernelChannel(cid)), {})
    for cid, message in ((8, b"READY=1\nX_VMSILO_AGENT=1"), (9, b"READY=1"), (2, b"READY=1")):
        guest, accepted = socket.socketpair()
        guest.sendall(message)
        relay.hear_vsock(accepted, (cid, 1023))
        with guest:
            guest.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert guest.recv(1) == b""
    assert {name: vm.ready for name, vm in relay.vms.items()} == {"banking": False, "work": True}
