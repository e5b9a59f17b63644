"""The floor of throughput, the guest's end: bytes over a vsock connection to the host, nothing else.

argv: send|receive|echo|pipe-send|pipe-receive PORT BYTES. The last two have a pipe between the bytes and
them, as a command of vm-run's has. After receiving all it sends one byte.
"""

import os
import select
import socket
import sys

BLOCK = 256 * 1024


def send(sock: socket.socket, left: int) -> None:
    block = memoryview(bytearray(BLOCK))
    while left:
        left -= sock.send(block[:left])


def receive(sock: socket.socket, left: int) -> None:
    block = memoryview(bytearray(BLOCK))
    while left:
        count = sock.recv_into(block[:left])
        if not count:
            raise SystemExit("the host closed")
        left -= count
    sock.sendall(b".")


def pipe_send(sock: socket.socket, left: int) -> None:
    block = memoryview(bytearray(BLOCK))
    while left:
        count = os.readv(0, [block])
        sock.sendall(block[:count])
        left -= count


def pipe_receive(sock: socket.socket, left: int) -> None:
    block = memoryview(bytearray(BLOCK))
    while left:
        count = sock.recv_into(block)
        if not count:
            raise SystemExit("the host closed")
        left -= count
        written = 0
        while written < count:
            written += os.write(1, block[written:count])
    sock.sendall(b".")


def echo(sock: socket.socket, left: int) -> None:
    """Never stops reading, as the host has to keep the bytes under way few: the device (0.3.0) can stall
    when both directions are full.
    """
    sock.settimeout(0)
    block = memoryview(bytearray(BLOCK))
    held = bytearray()
    poll = select.poll()
    while left:
        poll.register(sock, select.POLLIN | (select.POLLOUT if held else 0))
        ((_fd, events),) = poll.poll()
        if events & ~select.POLLOUT:
            count = sock.recv_into(block)
            if not count:
                raise SystemExit("the host closed")
            held += block[:count]
        if events & select.POLLOUT:
            sent = sock.send(held)
            del held[:sent]
            left -= sent


def main(mode: str, port: int, size: int) -> None:
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    sock.connect((socket.VMADDR_CID_HOST, port))
    modes = {"send": send, "receive": receive, "echo": echo}
    modes |= {"pipe-send": pipe_send, "pipe-receive": pipe_receive}
    modes[mode](sock, size)
    sock.settimeout(None)
    sock.recv(1)  # until the host has closed: a close of ours could overtake data in the device


main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
