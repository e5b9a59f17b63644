"""Forwards at their edges: a hostile forwarder at the relay, roles at the agent, a guest that breaks the
frames, ports that are taken.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from typing import TYPE_CHECKING

import pytest
import vmsilo_wire as wire
from agent_client import AgentProcess
from forward_host import find_free_port
from pydantic import TypeAdapter
from relay_host import PATIENCE, SECRET, Control, RelayHost, run_host
from vmsilo_wire.bridge import Bridge
from vmsilo_wire.payload import parse_error
from vmsilod.config.forward_ports import ForwardPort, ForwardPorts
from vmsilod.errors import StartFailed
from vmsilod.forwards import bind_listeners

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FORWARDS: TypeAdapter[tuple[ForwardPort, ...]] = TypeAdapter(ForwardPorts)


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[RelayHost]:
    with run_host(tmp_path) as host:
        yield host


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    agent = AgentProcess(tmp_path)
    yield agent
    agent.assert_idle()
    agent.stop()


def bring(relay: RelayHost, control: Control, **fields: str) -> tuple[socket.socket, dict[str, object]]:
    """A forwarder's end of a link, and the relay's answer to vmsilod."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    relay.connections.callback(ours.close)
    ours.settimeout(PATIENCE)
    order = {"name": "banking", "generation": "g1", **fields}
    with its:
        return ours, control.call("forward", [its.fileno()], **order)


def receive(link: socket.socket) -> tuple[dict[str, object], list[int]]:
    packet, fds, _, _ = socket.recv_fds(link, 4096, 1)
    return (json.loads(packet) if packet else {}), fds


# ---- the relay


def test_a_forwarder_gets_connections_that_may_only_forward(relay: RelayHost) -> None:
    control = relay.start()
    relay.add(control)
    device = relay.device()
    link, answer = bring(relay, control)
    assert answer == {"ok": True}
    assert receive(link) == ({"ready": False}, [])
    relay.make_ready()
    assert receive(link)[0] == {"restarted": True}
    assert receive(link)[0] == {"ready": True}
    link.send(b'{"id":7}')
    assert device.agents.get(timeout=PATIENCE).hello == {"v": 1, "role": "forward", "secret": SECRET}
    packet, fds = receive(link)
    assert packet == {"id": 7}
    os.close(fds[0])
    relay.say(b"X_VMSILO_AGENT=0")
    assert receive(link)[0] == {"ready": False}


@pytest.mark.parametrize(
    "packet",
    [
        b"x",
        b"[]",
        b"{}",
        b'{"id":-1}',
        b'{"id":1,"role":"root"}',
        b'{"id":1,"port":22}',
        b'{"id":' + b"1" * 200,
    ],
)
def test_a_forwarder_that_asks_for_more_is_let_go(relay: RelayHost, packet: bytes) -> None:
    control = relay.start()
    relay.add(control)
    device = relay.device()
    link, _ = bring(relay, control)
    link.send(packet)
    while receive(link)[0]:
        pass
    assert device.connects == 0
    assert "let go" in relay.log.read_text()
    relay.log.write_text("")


def test_a_flood_of_questions_is_answered_at_a_bounded_rate(relay: RelayHost) -> None:
    """And another caller of the same relay has its turn meanwhile."""
    control = relay.start()
    relay.add(control)
    relay.device()
    relay.make_ready()
    link, _ = bring(relay, control)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    begin = time.monotonic()
    for number in range(100):
        link.send(json.dumps({"id": number}).encode())
    answered = 0
    while answered < 100:
        packet, fds = receive(link)
        answered += "id" in packet
        for fd in fds:
            os.close(fd)
    assert time.monotonic() - begin > 100 / 8 * 0.02 - 0.05
    assert control.call("list")["vms"][0]["name"] == "banking"


def test_a_link_is_of_one_generation_and_ends_with_it(relay: RelayHost) -> None:
    control = relay.start()
    relay.add(control)
    _, answer = bring(relay, control, generation="g0")
    assert answer["error"]["code"] == "not-found"  # type: ignore[index] # JSON
    _, answer = bring(relay, control, name="other")
    assert answer["error"]["code"] == "not-found"  # type: ignore[index] # JSON
    first, _ = bring(relay, control)
    second, _ = bring(relay, control)
    assert receive(first)[0] == {"ready": False}
    assert receive(first) == ({}, [])  # replaced
    control.call("remove", name="banking", generation="g1")
    assert receive(second)[0] == {"ready": False}
    assert receive(second) == ({}, [])


# ---- the agent


@pytest.mark.parametrize("role", ["user", "root", "control"])
def test_no_other_role_may_forward(agent: AgentProcess, role: str) -> None:
    with agent.connect(role) as client:
        client.send(wire.CONNECT, struct.pack(">H", 22))
        assert parse_error(client.expect(wire.ERROR))[0] == "bad-request"


def test_the_role_may_do_nothing_else(agent: AgentProcess) -> None:
    with agent.connect("forward") as client:
        client.spawn("true")
        assert parse_error(client.expect(wire.ERROR))[0] == "denied"
    with agent.connect("forward") as client:
        client.send(wire.POWEROFF)
        assert parse_error(client.expect(wire.ERROR))[0] == "denied"
    with agent.connect("forward") as client:
        client.send(wire.CONSOLE_SIZE, struct.pack(">HH", 10, 10))
        assert parse_error(client.expect(wire.ERROR))[0] == "bad-request"


def test_a_port_of_the_guest_that_is_taken_is_told(agent: AgentProcess) -> None:
    with socket.create_server(("127.0.0.1", find_free_port())) as taken, agent.connect("forward") as client:
        port = taken.getsockname()[1]
        client.send(wire.ACCEPT, struct.pack(">H", port))
        assert parse_error(client.expect(wire.ERROR)) == (
            "failed",
            f"port {port} of the guest: Address already in use",
        )


@pytest.mark.parametrize("payload", [b"", b"\0\0", b"\0\0\0"])
def test_no_port_is_refused(agent: AgentProcess, payload: bytes) -> None:
    with agent.connect("forward") as client:
        client.sock.sendall(struct.pack(">BI", wire.CONNECT, len(payload)) + payload)
        assert parse_error(client.expect(wire.ERROR))[0] == "bad-request"


# ---- the bridge, against a peer that breaks the rules


def make_bridge() -> tuple[socket.socket, socket.socket, Bridge, list[str]]:
    plain, client = socket.socketpair()
    framed, guest = socket.socketpair()
    ended: list[str] = []
    bridge = Bridge(plain, framed, lambda *_: None, ended.append, in_guest=False)
    bridge.start()
    return client, guest, bridge, ended


def frame(kind: int, payload: bytes = b"") -> bytes:
    return struct.pack(">BI", kind, len(payload)) + payload


@pytest.mark.parametrize(
    "data",
    [
        frame(wire.STDOUT, b"x"),
        frame(wire.FORWARD_IN, b"x"),
        struct.pack(">BI", wire.FORWARD_OUT, wire.DATA_MAX + 1),
        frame(wire.DONE),
        frame(wire.DONE, b"x"),
        frame(wire.FORWARD_OUT) + frame(wire.FORWARD_OUT, b"x"),
        frame(wire.FORWARD_OUT) + frame(wire.DONE),
        b"\xff" * 100,
    ],
)
def test_a_guest_that_breaks_the_frames_loses_the_connection(data: bytes) -> None:
    client, guest, bridge, ended = make_bridge()
    with client, guest:
        guest.sendall(data)
        bridge.on_framed(readable=True, writable=False)
        assert len(ended) == 1
        assert ended[0]
        assert guest.recv(10) == b""


def test_pieces_are_passed_on_before_their_frame_is_whole() -> None:
    client, guest, bridge, ended = make_bridge()
    with client, guest:
        data = frame(wire.FORWARD_OUT, b"abcdef")
        for index in range(len(data)):
            guest.sendall(data[index : index + 1])
            bridge.on_framed(readable=True, writable=False)
        assert client.recv(100) == b"abcdef"
        assert not ended
        bridge.close("over")


def test_the_host_closes_when_both_ends_were_said_and_heard() -> None:
    client, guest, bridge, ended = make_bridge()
    with client, guest:
        client.shutdown(socket.SHUT_WR)
        bridge.on_plain(readable=True, writable=False)
        assert guest.recv(100) == frame(wire.FORWARD_IN)
        guest.sendall(frame(wire.FORWARD_OUT, b"rest") + frame(wire.FORWARD_OUT))
        bridge.on_framed(readable=True, writable=False)
        assert client.recv(100) == b"rest"
        assert client.recv(100) == b""
        assert not ended
        guest.sendall(frame(wire.DONE))
        bridge.on_framed(readable=True, writable=False)
        assert ended == [""]


# ---- vmsilod


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        forwards = FORWARDS.validate_python(
            [
                {"from": "host", "host": find_free_port(), "guest": 1},
                {"from": "host", "host": port, "guest": 2},
            ]
        )
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with pytest.raises(StartFailed, match=f"port {port} of 127.0.0.1 is in use, so VM 'banking'"):
            bind_listeners("banking", forwards)
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_an_address_that_the_host_has_not_is_named() -> None:
    forwards = FORWARDS.validate_python([{"from": "host", "host": "192.0.2.7:80", "guest": 80}])
    with pytest.raises(StartFailed, match=r"no address 192\.0\.2\.7"):
        bind_listeners("banking", forwards)


def test_listeners_are_of_the_host_forwards_alone_and_in_their_order() -> None:
    ports = [find_free_port(), find_free_port()]
    forwards = FORWARDS.validate_python(
        [
            {"from": "guest", "guest": 1, "host": 1},
            {"from": "host", "host": ports[0], "guest": 1},
            {"from": "host", "host": f"[::1]:{ports[1]}", "guest": 1},
        ]
    )
    socks = [socket.socket(fileno=fd) for fd in bind_listeners("banking", forwards)]
    assert [sock.getsockname()[:2] for sock in socks] == [("127.0.0.1", ports[0]), ("::1", ports[1])]
    for sock in socks:
        sock.close()
