#!/usr/bin/python3 -IS
"""Stand-in for vhost-device-vsock: the host's `CONNECT 700` reaches the stand-in guest's agent.

Installed in the test host's /usr/local/bin. Gets from the VMM, over the `vhost` socket, a descriptor of the
guest's folder, and copies bytes between the host's connections and the agent's socket in it. Runs under the
real device's sandbox.
"""

import contextlib
import itertools
import socket
import sys
import threading

ports = itertools.count(1024)


def listen(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(path)
    sock.listen(1024)
    return sock


def take_guest(listener: socket.socket) -> tuple[socket.socket, int]:
    vmm, _ = listener.accept()
    _, fds, _, _ = socket.recv_fds(vmm, 16, 1)
    return vmm, fds[0]


def copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def serve(host: socket.socket, folder: int) -> None:
    with host, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent, contextlib.suppress(OSError):
        line = b""
        while not line.endswith(b"\n"):
            byte = host.recv(1)
            if not byte or len(line) > 32:
                return
            line += byte
        if line != b"CONNECT 700\n":
            return
        # Where the guest has no agent, or not yet, the host finds its connection closed.
        agent.connect(f"/proc/self/fd/{folder}/agent")
        host.sendall(b"OK %d\n" % next(ports))
        back = threading.Thread(target=copy, args=(agent, host))
        back.start()
        copy(host, agent)
        back.join()


def main() -> None:
    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    vsock = listen(options["--uds-path"])
    vmm, folder = take_guest(listen(options["--socket"]))
    threading.stack_size(256 * 1024)
    with vmm:
        while True:
            host, _ = vsock.accept()
            threading.Thread(target=serve, args=(host, folder), daemon=True).start()


if __name__ == "__main__":
    main()
