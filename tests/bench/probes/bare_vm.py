"""The floor of a cold start: the VMM as vmsilo starts it, without vmsilo, and `true` run by its agent.

argv[1]: {"argv": the VMM's, "fds": {its number: ours}, "monitor": its number, "device": argv of
vhost-device-vsock, "directory": for the sockets, "secret": HEX, "wire": folder of vmsilo_wire, "seconds":
MOST}. Prints the seconds from the beginning until the VMM was started, the guest was ready, and `true` had
ended.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any


def wait_for_socket(path: Path, deadline: float) -> None:
    while not path.is_socket():
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.001)


def wait_until_ready(listener: socket.socket) -> None:
    wanted = {b"READY=1", b"X_VMSILO_AGENT=1"}
    while wanted:
        with listener.accept()[0] as guest:
            wanted -= set(guest.recv(4096).split(b"\n"))


def run_true(path: Path, request: dict[str, Any], deadline: float) -> None:
    sys.path.insert(0, request["wire"])
    import vmsilo_wire as wire
    from vmsilo_wire.payload import Spawn, encode_hello, encode_spawn, parse_exit

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
        agent.settimeout(max(deadline - time.monotonic(), 1))
        agent.connect(str(path))
        agent.sendall(b"CONNECT %d\n" % wire.AGENT_PORT)
        while agent.recv(1) != b"\n":
            pass
        agent.sendall(encode_hello("user", request["secret"]) + encode_spawn(Spawn(("true",))))
        decoder = wire.Decoder(wire.TO_CLIENT)
        while True:
            data = agent.recv(4096)
            if not data:
                raise ConnectionError("the agent closed")
            for kind, payload in decoder.feed(data):
                if kind == wire.EXIT and parse_exit(payload) == 0:
                    return


def start_vmm(request: dict[str, Any], monitor: socket.socket) -> int:
    given = {int(number): fd for number, fd in request["fds"].items()}
    given[request["monitor"]] = monitor.fileno()
    # Out of the way of the numbers that they get.
    moved = {number: os.dup2(fd, 100 + number) for number, fd in given.items()}
    null = os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, 2, 1)]
    actions += [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in moved.items()]
    argv = request["argv"]
    return os.posix_spawnp(argv[0], argv, {"PATH": os.environ["PATH"]}, file_actions=actions)


def measure(request: dict[str, Any], children: list[int]) -> list[float]:
    directory = Path(request["directory"])
    monitor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    monitor.bind(str(directory / "monitor.sock"))
    monitor.listen(4)
    deadline = time.monotonic() + request["seconds"]
    begin = time.monotonic()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(directory / "vsock_701"))
        listener.listen(16)
        listener.settimeout(request["seconds"])
        device = request["device"]
        children.append(os.posix_spawnp(device[0], device, {"PATH": os.environ["PATH"]}))
        wait_for_socket(directory / "vhost", deadline)
        children.append(start_vmm(request, monitor))
        started = time.monotonic()
        wait_until_ready(listener)
        ready = time.monotonic()
    run_true(directory / "vsock", request, deadline)
    return [moment - begin for moment in (started, ready, time.monotonic())]


def main() -> None:
    request = json.loads(sys.argv[1])
    children: list[int] = []
    try:
        found = measure(request, children)
    finally:
        for pid in reversed(children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    print(json.dumps(found))


main()
