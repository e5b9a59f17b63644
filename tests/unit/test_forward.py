"""Forwarded ports through the real forwarder, relay and agent."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
from forward_host import ForwardHost, read_all, run_forwards
from relay_host import PATIENCE, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MEGABYTES = 8


@pytest.fixture
def host(tmp_path: Path) -> Iterator[ForwardHost]:
    with run_forwards(tmp_path) as host:
        yield host


def accept(listener: socket.socket) -> socket.socket:
    sock, _ = listener.accept()
    sock.settimeout(PATIENCE)
    return sock


def is_reset(sock: socket.socket) -> bool:
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return False


def send_until_stuck(sock: socket.socket) -> int:
    sent = 0
    try:
        while sent < 256 << 20:
            sent += sock.send(b"x" * 65536)
    except TimeoutError:
        return sent
    raise AssertionError("it is never full")


def test_a_service_of_the_guest_is_reached_from_the_host(host: ForwardHost) -> None:
    service = host.listen()
    port = host.from_host(service.getsockname()[1])
    host.start()
    host.relay.make_ready()
    client = host.connect(port)
    with accept(service) as served:
        client.sendall(b"hello")
        assert served.recv(100) == b"hello"
        served.sendall(b"welcome")
        assert client.recv(100) == b"welcome"


def test_a_service_of_the_host_is_reached_from_the_guest(host: ForwardHost) -> None:
    service = host.listen()
    port = host.from_guest(service.getsockname()[1])
    host.start()
    host.relay.make_ready()
    for number in range(5):
        client = host.connect_when_open(port)
        with accept(service) as served:
            client.sendall(b"%d" % number)
            assert served.recv(100) == b"%d" % number


def test_each_direction_ends_by_itself(host: ForwardHost) -> None:
    """The request's end is the signal for the answer, which is long after it."""
    service = host.listen()
    port = host.from_host(service.getsockname()[1])
    host.start()
    host.relay.make_ready()
    client = host.connect(port)
    with accept(service) as served:
        client.sendall(b"request")
        client.shutdown(socket.SHUT_WR)
        assert read_all(served) == b"request"
        time.sleep(0.2)
        served.sendall(b"answer")
        served.close()
        assert read_all(client) == b"answer"


def test_bytes_arrive_unchanged_both_ways_at_once(host: ForwardHost) -> None:
    service = host.listen()
    port = host.from_guest(service.getsockname()[1])
    host.start()
    host.relay.make_ready()
    client = host.connect_when_open(port)
    data = [random.Random(seed).randbytes(MEGABYTES << 20) for seed in (1, 2)]
    with accept(service) as served:
        senders = []
        for sock, sent in ((client, data[0]), (served, data[1])):

            def send(sock: socket.socket = sock, sent: bytes = sent) -> None:
                sock.sendall(sent)
                sock.shutdown(socket.SHUT_WR)

            senders.append(threading.Thread(target=send))
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(read_all(served)))
        for thread in (*senders, reader):
            thread.start()
        got_back = read_all(client)
        for thread in (*senders, reader):
            thread.join(PATIENCE)
        assert hashlib.sha256(got_back).digest() == hashlib.sha256(data[1]).digest()
        assert hashlib.sha256(got[0]).digest() == hashlib.sha256(data[0]).digest()


def test_who_is_not_read_is_not_read_from(host: ForwardHost) -> None:
    """A sender whose peer takes nothing is held up, while another connection of the same VM goes on."""
    service = host.listen()
    port = host.from_host(service.getsockname()[1])
    host.start()
    host.relay.make_ready()
    client = host.connect(port)
    with accept(service) as stuck:
        client.settimeout(1)
        sent = send_until_stuck(client)
        assert sent < 64 << 20
        other = host.connect(port)
        with accept(service) as served:
            other.sendall(b"me too")
            assert served.recv(100) == b"me too"
        client.settimeout(PATIENCE)
        client.shutdown(socket.SHUT_WR)
        assert len(read_all(stuck)) == sent


def test_a_port_without_a_service_is_a_reset_and_not_an_end(host: ForwardHost) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = free.getsockname()[1]
    port = host.from_host(nobody)
    host.start()
    host.relay.make_ready()
    assert is_reset(host.connect(port))
    wait_until(lambda: "Connection refused" in host.log.read_text(), "the reason in the log")


def test_a_service_that_resets_is_seen_as_a_reset(host: ForwardHost) -> None:
    service = host.listen()
    port = host.from_host(service.getsockname()[1])
    host.start()
    host.relay.make_ready()
    client = host.connect(port)
    served = accept(service)
    client.sendall(b"unread")
    wait_until(lambda: served.recv(100, socket.MSG_PEEK), "the bytes")
    served.close()  # with bytes that were not read: TCP resets
    assert is_reset(client)


def test_a_connection_waits_for_the_guest_to_boot(host: ForwardHost) -> None:
    service = host.listen()
    port = host.from_host(service.getsockname()[1])
    host.start()
    client = host.connect(port)
    client.sendall(b"early")
    service.settimeout(0.3)
    with pytest.raises(TimeoutError):
        service.accept()
    service.settimeout(PATIENCE)
    host.relay.make_ready()
    with accept(service) as served:
        assert served.recv(100) == b"early"


def test_a_restart_of_the_relay_keeps_connections_and_new_ones_come(host: ForwardHost) -> None:
    service = host.listen()
    port = host.from_host(service.getsockname()[1])
    host.start()
    host.relay.make_ready()
    client = host.connect(port)
    with accept(service) as served:
        host.relay.kill()
        client.sendall(b"still there")
        assert served.recv(100) == b"still there"
        host.control = host.relay.start()
        other = host.connect(port)
        with accept(service) as served_too:
            other.sendall(b"new")
            assert served_too.recv(100) == b"new"
    assert [question["listening"] for question in host.vmsilod.questions][-1] is True


def test_a_killed_forwarder_goes_on_with_its_listeners(host: ForwardHost) -> None:
    service = host.listen()
    port = host.from_host(service.getsockname()[1])
    host.start()
    host.relay.make_ready()
    client = host.connect(port)
    served = accept(service)
    client.sendall(b"x")
    assert served.recv(1) == b"x"
    host.kill()
    assert is_reset(client) or True  # the kernel's choice: it closes what the process had
    assert is_reset(served)
    waiting = host.connect(port)  # in the listener's queue
    host.start(stored=True)
    with accept(service) as served:
        waiting.sendall(b"waited")
        assert served.recv(100) == b"waited"
    assert host.vmsilod.questions[-1]["listening"] is True


def test_a_guest_that_begins_anew_breaks_what_was_open(host: ForwardHost) -> None:
    service, inner = host.listen(), host.listen()
    port = host.from_guest(service.getsockname()[1])
    from_host = host.from_host(inner.getsockname()[1])
    host.start()
    host.relay.make_ready()
    client = host.connect(from_host)
    with accept(inner):
        host.relay.say(b"X_VMSILO_AGENT=1")
        assert is_reset(client)
    service.settimeout(0.5)

    def served_again() -> bool:
        """Not the first time, where the agent has not heard yet that what is parked there is given up."""
        with_guest = host.connect_when_open(port)
        try:
            with accept(service) as served:
                with_guest.sendall(b"again")
                return served.recv(100) == b"again"
        except TimeoutError:
            assert is_reset(with_guest)
            return False

    wait_until(served_again, "a new connection")


def test_the_guest_closes_its_port_when_the_host_is_gone(host: ForwardHost) -> None:
    service = host.listen()
    port = host.from_guest(service.getsockname()[1])
    host.start()
    host.relay.make_ready()
    host.connect_when_open(port).close()
    host.kill()

    def refused() -> bool:
        try:
            host.connect(port).close()
        except ConnectionRefusedError:
            return True
        return False

    deadline = time.monotonic() + 20
    while not refused():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_flood_is_bounded_and_leaves_nothing(host: ForwardHost) -> None:
    """More connections than there are places: those above are reset, and all places come back."""
    service = host.listen()
    port = host.from_host(service.getsockname()[1])
    host.start()
    host.relay.make_ready()
    wait_until(lambda: "forwarding" in host.log.read_text(), "the order")
    idle = host.count_fds()
    clients, resets = [], 0
    for _ in range(130):
        try:
            clients.append(host.connect(port))
        except ConnectionResetError:
            resets += 1
    served = [accept(service) for _ in range(100)]
    for client in clients:
        client.settimeout(0.02)
        try:
            resets += is_reset(client)
        except TimeoutError:
            continue
    assert resets == 30
    for sock in (*clients, *served):
        sock.close()
    wait_until(lambda: host.count_fds() <= idle, f"{idle} descriptors")
    host.agent.assert_idle()
