"""The agent against peers that are hostile, broken or gone; its roles; what it says of its own accord."""

from __future__ import annotations

import os
import pwd
import socket
import threading
from typing import TYPE_CHECKING

import pytest
import vmsilo_wire as wire
from agent_client import SECRET, AgentProcess, Client, connect, wait_for
from vmsilo_agent.announce import Announcer, announce
from vmsilo_agent.child import read_session_env
from vmsilo_agent.loop import Loop
from vmsilo_wire.payload import encode_hello, parse_error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    directory = tmp_path_factory.mktemp("agent")
    process = AgentProcess(directory, "--poweroff-command", f"touch {directory}/off")
    yield process
    process.stop()


@pytest.fixture
def agent(shared: AgentProcess) -> Iterator[AgentProcess]:
    yield shared
    assert shared.run("echo", "alive").stdout == b"alive\n"
    shared.assert_idle()


def refusal(client: Client) -> str | None:
    """The error code, if one came before the end."""
    frame = client.receive()
    if frame is None:
        return None
    assert frame[0] == wire.ERROR
    assert client.receive() is None
    return parse_error(frame[1])[0]


def test_wrong_secret_is_denied(agent: AgentProcess) -> None:
    with connect(agent.socket) as client:
        client.hello(secret="f" * 64)
        client.spawn("true")
        assert refusal(client) == "denied"


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        os.urandom(8192),
        b"\x01\xff\xff\xff\xff",
        wire.encode_frame(wire.PING),
        encode_hello("user", SECRET).replace(b'"user"', b'"king"'),
    ],
)
def test_garbage_instead_of_hello(agent: AgentProcess, data: bytes) -> None:
    with connect(agent.socket) as client:
        client.sock.sendall(data)
        assert refusal(client) in {"bad-request", None}


@pytest.mark.parametrize(
    "data",
    [
        b"\x03\xff\xff\xff\xff",
        b"\x02\x7f\xff\xff\xff{",
        wire.encode_frame(wire.SPAWN, b"{}"),
        wire.encode_frame(wire.SPAWN, b"[" * 100_000),
        wire.encode_frame(wire.STDIN, b"x"),
        wire.encode_frame(wire.SIGNAL, b"\x09"),
        encode_hello("root", SECRET),
    ],
)
def test_garbage_after_hello(agent: AgentProcess, data: bytes) -> None:
    with agent.connect() as client:
        client.sock.sendall(data)
        assert refusal(client) == "bad-request"


def test_half_frames_and_vanished_peers_leave_nothing(agent: AgentProcess) -> None:
    whole = encode_hello("user", SECRET) + wire.encode_frame(wire.PING, b"x")
    for cut in range(1, len(whole), 9):
        with connect(agent.socket) as client:
            client.sock.sendall(whole[:cut])


def test_more_input_than_the_window_ends_the_command(agent: AgentProcess) -> None:
    with agent.connect() as client:
        client.spawn("sleep", "60")
        client.started()
        frames = (1 << 20) // wire.DATA_MAX * 2 + 1  # the command's pipe takes up to one window, too
        try:
            for _ in range(frames):
                client.send(wire.STDIN, bytes(wire.DATA_MAX))
        except (BrokenPipeError, ConnectionResetError):
            return
        while (frame := client.receive()) is not None:
            assert frame[0] in {wire.CONSUMED, wire.ERROR}


def test_input_after_its_end_is_a_violation(agent: AgentProcess) -> None:
    with agent.connect() as client:
        client.spawn("sleep", "60")
        client.started()
        client.send(wire.STDIN)
        client.send(wire.STDIN, b"x")
        assert refusal(client) == "bad-request"


def test_forbidden_signal_ends_the_command(agent: AgentProcess) -> None:
    with agent.connect() as client:
        client.spawn("sleep", "60")
        client.started()
        client.send(wire.SIGNAL, b"\x09")
        assert refusal(client) == "bad-request"


def test_idle_strangers_do_not_keep_a_good_client_out(agent: AgentProcess) -> None:
    strangers = [connect(agent.socket) for _ in range(100)]
    assert agent.run("echo", "hello").stdout == b"hello\n"
    assert strangers[0].receive() is None  # the oldest had to go
    for stranger in strangers:
        stranger.close()


def test_peer_that_never_reads_is_bounded(agent: AgentProcess) -> None:
    with agent.connect() as client, connect(agent.socket) as flood:
        client.spawn("cat", "/dev/zero")
        flood.hello()
        flood.sock.settimeout(0.3)
        pings = wire.encode_frame(wire.PING, bytes(64)) * 100_000
        with pytest.raises(TimeoutError):
            flood.sock.sendall(pings)
        resident = int((agent.socket.parent / f"/proc/{agent.pid}/statm").read_text().split()[1]) * 4096
        assert resident < 64 * 1024 * 1024
        assert agent.run("echo", "meanwhile").stdout == b"meanwhile\n"


def test_ping_before_and_during_a_command(agent: AgentProcess) -> None:
    with agent.connect("control") as client:
        client.send(wire.PING, b"1")
        assert client.expect(wire.PONG) == b"1"
    with agent.connect() as client:
        client.spawn("cat")
        client.started()
        client.send(wire.PING, b"2")
        assert client.expect(wire.PONG) == b"2"
        assert client.collect(b"").exit == 0


def test_roles(agent: AgentProcess) -> None:
    with agent.connect("control") as client:
        client.spawn("true")
        assert refusal(client) == "denied"
    with agent.connect("user") as client:
        client.send(wire.POWEROFF)
        assert refusal(client) == "denied"
    flag = agent.socket.parent / "off"
    assert not flag.exists()
    with agent.connect("control") as client:
        client.send(wire.POWEROFF)
        assert client.receive() is None
    wait_for(flag.exists)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to change the user")
def test_command_becomes_the_guest_user(tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    agent = AgentProcess(tmp_path, user="nobody")
    try:
        assert agent.run("id", "-u").stdout == f"{nobody.pw_uid}\n".encode()
        assert agent.run("id", "-G").stdout.split() == [str(nobody.pw_gid).encode()]
        with agent.connect("root") as client:
            assert client.run("id", "-u").stdout == b"0\n"
        with agent.connect() as client:
            result = client.run("sh", "-c", "echo x > /dev/tty && stat -c %U $(tty)", pty=(24, 80))
            assert result.stdout == b"x\r\nnobody\r\n"
        agent.assert_idle()
    finally:
        agent.stop()


def test_unknown_guest_user_is_an_error_not_root(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path, user="no-such-user")
    try:
        error = agent.run("id").error
        assert error is not None
        assert error[0] == "failed"
    finally:
        agent.stop()


@pytest.mark.parametrize(
    ("systemctl", "expected"),
    [
        ("echo 'systemd 254 (254.1)'", ["X_VMSILO_AGENT=1\nX_VMSILO_READY_FROM=systemd\n"]),
        ("echo 'systemd 252 (252.1)'", ["X_VMSILO_AGENT=1\nX_VMSILO_READY_FROM=agent\n", "READY=1\n"]),
        (None, ["X_VMSILO_AGENT=1\nX_VMSILO_READY_FROM=agent\n", "READY=1\n"]),
    ],
)
def test_announcement_reaches_a_relay_that_comes_late(
    tmp_path: Path, systemctl: str | None, expected: list[str]
) -> None:
    fake = tmp_path / "systemctl"
    if systemctl is not None:
        fake.write_text(f"#!/bin/sh\n{systemctl}\n")
        fake.chmod(0o755)
    path = tmp_path / "relay.sock"
    agent = AgentProcess(tmp_path, "--announce", f"unix:{path}", "--systemctl", str(fake))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen(1)
            listener.settimeout(10)
            for text in expected:
                peer, _ = listener.accept()
                with peer:
                    peer.settimeout(10)
                    assert peer.recv(4096).decode() == text
            agent.assert_idle()
            agent.process.terminate()
            peer, _ = listener.accept()
            with peer:
                assert peer.recv(4096) == b"X_VMSILO_AGENT=0\n"
    finally:
        agent.stop()


def test_readiness_that_nobody_heard_is_said_again(tmp_path: Path) -> None:
    """PID 1's own READY=1 may have met a relay that was just killed."""
    fake = tmp_path / "systemctl"
    fake.write_text("#!/bin/sh\necho 'systemd 257 (257)'\n")
    fake.chmod(0o755)
    loop = Loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "relay.sock"))
        listener.listen(2)
        listener.settimeout(10)
        announce(loop, Announcer(loop, str(tmp_path / "relay.sock")), str(fake), backstop=0.05)
        heard = []

        def hear() -> None:
            for _ in range(2):
                peer, _address = listener.accept()
                with peer:
                    heard.append(peer.recv(4096).decode())
            loop.call_later(0, loop.stop)

        thread = threading.Thread(target=hear)
        thread.start()
        loop.call_later(10, loop.stop)
        loop.run()
        thread.join(10)
    assert heard == ["X_VMSILO_AGENT=1\nX_VMSILO_READY_FROM=systemd\n", "READY=1\n"]


def test_systemd_is_told_once_the_agent_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        agent = AgentProcess(tmp_path)
        notify.settimeout(10)
        try:
            assert notify.recv(100) == b"READY=1"
            assert b"NOTIFY_SOCKET" not in agent.run("env").stdout
        finally:
            agent.stop()


def test_session_environment_of_the_right_user_only(tmp_path: Path) -> None:
    path, uid = tmp_path / "session.env", os.getuid()
    assert read_session_env(str(path), uid) == {}
    path.write_bytes(b"WAYLAND_DISPLAY=wayland-0\n9=x\nno line\nA=b=c\nEMPTY=\nZ=\0\n\xff=\n")
    assert read_session_env(str(path), uid) == {"WAYLAND_DISPLAY": "wayland-0", "A": "b=c", "EMPTY": ""}
    assert read_session_env(str(path), uid + 1) == {}
    link = tmp_path / "link"
    link.symlink_to(path)
    assert read_session_env(str(link), uid) == {}
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert read_session_env(str(fifo), uid) == {}
    path.write_bytes(b"A=" + b"x" * 70_000)
    assert read_session_env(str(path), uid) == {}
