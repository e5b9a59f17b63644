"""The command sockets of a real relayd, with a real client, a manager and a vsock device around it."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from relay_host import SECRET, Control, RelayHost, read_exactly, run_host, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ASK_AS_OTHER = """
import os, socket, sys
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
try:
    sock.send(b'{"v":1,"op":"connect","wait":1}')
except OSError:
    pass
print(sock.recv(4096).decode())
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[RelayHost]:
    with run_host(tmp_path) as host:
        yield host


@pytest.fixture
def control(host: RelayHost) -> Control:
    control = host.start(
        "dial_seconds=1", "request_seconds=1", "message_seconds=0.3", "publish_seconds=0.01"
    )
    assert host.add(control) == {"ok": True}
    return control


def ask_as_other(path: Path) -> dict[str, object]:
    """Ask as nobody, which needs root; the directories above are closed to it, so it starts inside."""
    path.parent.chmod(0o711)
    path.chmod(0o666)
    done = subprocess.run(
        [sys.executable, "-I", "-c", ASK_AS_OTHER, path.name],
        cwd=path.parent,
        capture_output=True,
        check=True,
        timeout=20,
    )
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@pytest.mark.usefixtures("control")
def test_warm_connect_hands_over_an_agent_with_hello_sent(host: RelayHost) -> None:
    device = host.device()
    device.greeting = b"from the agent"
    host.make_ready()
    packet, agent = host.client().finish()
    assert packet == {"ok": True}
    assert agent is not None
    with agent:
        assert os.get_blocking(agent.fileno())
        other = device.agents.get(timeout=5)
        assert other.hello == {"v": 1, "role": "user", "secret": SECRET}
        assert read_exactly(agent, 14) == b"from the agent"
        agent.sendall(b"command")
        assert read_exactly(other.sock, 7) == b"command"


@pytest.mark.usefixtures("control")
def test_cold_client_hears_the_boot_and_is_connected_when_ready(host: RelayHost) -> None:
    host.device()
    client = host.client()
    assert client.receive()[0] == {"state": "booting", "text": "", "wait": 5}
    host.say(b"STATUS=Mounting disks")
    assert client.receive()[0] == {"state": "booting", "text": "Mounting disks", "wait": 5}
    host.say(b"X_SYSTEMD_UNIT_ACTIVE=basic.target")
    assert client.receive()[0] == {"state": "booting", "text": "reached basic.target", "wait": 5}
    host.say(b"READY=1")
    host.say(b"X_VMSILO_AGENT=1")
    packet, agent = client.finish()
    assert packet == {"ok": True}
    assert agent is not None
    agent.close()


@pytest.mark.usefixtures("control")
@pytest.mark.parametrize(
    "half", [b"READY=1", b"X_VMSILO_AGENT=1", b"READY=0\nX_VMSILO_AGENT=1", b"READY=11"]
)
def test_half_ready_is_not_ready(host: RelayHost, half: bytes) -> None:
    host.device()
    host.say(half)
    assert host.client(wait=0.1).error() == "timeout"


def test_a_client_that_does_not_say_waits_as_the_vm_is_configured(host: RelayHost, control: Control) -> None:
    assert host.add(control, "slow", start_timeout=1).get("ok")
    client = host.client(name="slow", wait=None)
    began = time.monotonic()
    assert client.error() == "timeout"
    assert time.monotonic() - began > 0.9


@pytest.mark.usefixtures("control")
def test_another_users_request_is_denied(host: RelayHost) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to be another user")
    host.make_ready()
    answer = ask_as_other(host.directory / "banking.command")
    assert answer["error"]["code"] == "denied"  # type: ignore[index]  # it would fail here as well


def test_the_owner_is_admitted(host: RelayHost) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to be another user")
    control = host.start()
    host.add(control, owner=65534)
    host.device()
    host.make_ready()
    assert ask_as_other(host.directory / "banking.command") == {"ok": True}


@pytest.mark.usefixtures("control")
@pytest.mark.parametrize(
    "packet",
    [
        b"\0",
        b"\xff\xfe",
        b"[]",
        b"7",
        b"{}",
        b"[" * 4000,
        b'{"v":1,"op":"connect"}',
        b'{"v":2,"op":"connect","wait":1}',
        b'{"v":true,"op":"connect","wait":1}',
        b'{"v":1,"op":"spawn","wait":1}',
        b'{"v":1,"op":["connect"],"wait":1}',
        b'{"v":1,"op":"connect","wait":"1"}',
        b'{"v":1,"op":"connect","wait":true}',
        b'{"v":1,"op":"connect","wait":-1}',
        b'{"v":1,"op":"connect","wait":3601}',
        b'{"v":1,"op":"connect","wait":1e999}',
        b'{"v":1,"op":"connect","wait":NaN}',
        b'{"v":1,"op":"connect","wait":1' + b"0" * 4000 + b"}",
        b'{"v":1,"op":"connect","wait":1,"role":"root"}',
        b'{"v":1,"op":"connect","wait":1}' + b" " * 4066,
        b'{"v":1,"op":"connect","wait":1}' + b" " * 100000,
    ],
)
def test_bad_request_is_refused(host: RelayHost, packet: bytes) -> None:
    assert host.client(packet).error() == "bad-request"


@pytest.mark.usefixtures("control")
def test_a_second_request_is_refused(host: RelayHost) -> None:
    client = host.client()
    client.receive()
    client.sock.send(b'{"v":1,"op":"connect","wait":1}')
    assert client.error() == "bad-request"


@pytest.mark.usefixtures("control")
def test_silent_client_is_dismissed(host: RelayHost) -> None:
    assert host.client(b"").error() == "timeout"


@pytest.mark.usefixtures("control")
def test_idle_crowd_is_bounded_and_does_not_shut_out_another_vm(host: RelayHost) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    try:
        control = host.control()
        host.add(control, "work")
        host.device("work")
        host.make_ready("work")
        crowd = [host.client() for _ in range(1000)]
        packet, agent = host.client(name="work").finish()
        assert packet == {"ok": True}
        assert agent is not None
        agent.close()
        assert host.count_fds() < 600
        refused = [client for client in crowd if "error" in client.receive()[0]]
        assert len(refused) == 1000 - 512
        print(f"RSS with 512 waiting clients: {host.memory()} kB")
        for client in crowd:
            client.sock.close()
        host.device()
        host.make_ready()
        wait_until(lambda: host.count_fds() < 60, "the crowd is gone")
        packet, agent = host.client().finish()
        assert packet == {"ok": True}
        assert agent is not None
        agent.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("control")
def test_two_hundred_at_once_all_get_an_agent_of_their_own(host: RelayHost) -> None:
    device = host.device(backlog=4)
    clients = [host.client() for _ in range(200)]
    host.make_ready()
    agents = []
    for number, client in enumerate(clients):
        packet, agent = client.finish()
        assert packet == {"ok": True}
        assert agent is not None
        agent.sendall(b"%03d" % number)
        agents.append(agent)
    heard = {read_exactly(device.agents.get(timeout=5).sock, 3) for _ in clients}
    assert len(heard) == 200
    for agent in agents:
        agent.close()


@pytest.mark.usefixtures("control")
def test_slow_client_blocks_nobody_and_gets_its_answer(host: RelayHost) -> None:
    host.device()
    deaf = host.client()
    for number in range(400):
        host.say(b"STATUS=%d" % number)
    host.make_ready()
    packet, agent = host.client().finish()
    assert packet == {"ok": True}
    assert agent is not None
    agent.close()
    packet, agent = deaf.finish()  # it was only slow
    assert packet == {"ok": True}
    assert agent is not None
    agent.close()


@pytest.mark.usefixtures("control")
def test_symlinked_device_is_refused(host: RelayHost) -> None:
    device = host.device("other")
    (host.directory / "banking.vsock").symlink_to(device.path)
    host.make_ready()
    assert host.client().error() == "agent-unreachable"
    assert device.connects == 0


def test_device_of_another_owner_is_refused(host: RelayHost) -> None:
    control = host.start()
    path = str(host.directory / "banking.vsock")
    host.add(control, channel={"type": "hybrid", "path": path, "uid": os.getuid() + 1})
    device = host.device()
    host.make_ready()
    assert host.client().error() == "agent-unreachable"
    assert device.connects == 0


@pytest.mark.usefixtures("control")
@pytest.mark.parametrize("answer", [None, b"NO\n", b"OK x\n", b"OK 1", b"O" * 32, b"OK \x1b\n", b"\n"])
def test_device_that_gives_no_ok(host: RelayHost, answer: bytes | None) -> None:
    host.device(answer=answer)
    host.make_ready()
    before = host.cpu_seconds()
    assert host.client().error() == "agent-unreachable"
    assert host.cpu_seconds() - before < 0.5


@pytest.mark.usefixtures("control")
def test_agent_that_restarts_is_tried_again(host: RelayHost) -> None:
    device = host.device(answer=b"")
    host.make_ready()
    client = host.client()
    wait_until(lambda: device.connects >= 3, "several attempts")
    device.answer = b"OK 9\n"
    packet, agent = client.finish()
    assert packet == {"ok": True}
    assert agent is not None
    agent.close()


@pytest.mark.usefixtures("control")
def test_missing_device_is_waited_for_until_the_deadline(host: RelayHost) -> None:
    host.make_ready()
    assert host.client().error() == "agent-unreachable"


@pytest.mark.usefixtures("control")
def test_client_that_leaves_while_relayd_connects_leaves_nothing(host: RelayHost) -> None:
    device = host.device(answer=None)
    host.make_ready()
    client = host.client()
    wait_until(lambda: device.connects == 1, "the attempt")
    client.sock.close()


def test_removal_tells_those_who_wait(host: RelayHost, control: Control) -> None:
    device = host.device(answer=None)
    waiting = host.client()
    waiting.receive()
    host.make_ready()
    wait_until(lambda: device.connects == 1, "the attempt")
    idle = host.client(b"")
    wait_until(lambda: host.count_fds() > host.baseline + 5, "the idle client")
    assert control.call("remove", name="banking", generation="g1") == {"ok": True}
    assert waiting.error() == "stopping"
    assert idle.error() == "stopping"
    wait_until(lambda: host.count_fds() == host.baseline + 1, "all but the control connection closed")


def test_new_generation_replaces_the_old(host: RelayHost, control: Control) -> None:
    host.device(answer=None)
    waiting = host.client()
    waiting.receive()
    host.make_ready()
    assert host.add(control, generation="g2") == {"ok": True}
    assert waiting.error() == "stopping"
    assert control.call("remove", name="banking", generation="g1") == {"ok": True}
    assert [vm["generation"] for vm in control.call("list")["vms"]] == ["g2"]
    assert host.client(wait=0).error() == "timeout"


def test_same_generation_keeps_state_and_waiting_clients(host: RelayHost, control: Control) -> None:
    host.device()
    waiting = host.client()
    waiting.receive()
    host.say(b"X_VMSILO_AGENT=1")
    assert host.add(control) == {"ok": True}
    host.say(b"READY=1")
    packet, agent = waiting.finish()
    assert packet == {"ok": True}
    assert agent is not None
    agent.close()


@pytest.mark.usefixtures("control")
def test_descriptors_sent_by_a_client_are_not_kept(host: RelayHost) -> None:
    client = host.client(b"")
    wait_until(lambda: host.count_fds() > host.baseline, "the client")
    time.sleep(0.1)
    before = host.count_fds()
    request = b'{"v":1,"op":"connect","wait":5}'
    socket.send_fds(client.sock, [request], [client.sock.fileno()] * 100)
    client.receive()
    assert host.count_fds() == before


@pytest.mark.usefixtures("control")
def test_report_cost(host: RelayHost, capsys: pytest.CaptureFixture[str]) -> None:
    device = host.device()
    host.make_ready()
    times = []
    for _ in range(300):
        start = time.perf_counter()
        _, agent = host.client().receive()
        times.append(time.perf_counter() - start)
        assert agent is not None
        agent.close()
        device.agents.get(timeout=5)
    times.sort()
    with capsys.disabled():
        print(f"\nwarm connect: median {times[150] * 1e6:.0f} us, p99 {times[297] * 1e6:.0f} us; ", end="")
        print(f"RSS {host.memory()} kB")
