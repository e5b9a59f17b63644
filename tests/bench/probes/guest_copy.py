"""The floor of throughput, the guest's end: bytes over a vsock connection to the host, nothing else.

argv: send|receive|echo PORT BYTES. After receiving all it sends one byte.
"""

import socket
import sys

BLOCK = 256 * 1024


def main(mode: str, port: int, left: int) -> None:
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    sock.connect((socket.VMADDR_CID_HOST, port))
    block = memoryview(bytearray(BLOCK))
    while left:
        count = min(left, BLOCK)
        if mode != "send":
            count = sock.recv_into(block[:count])
            if not count:
                raise SystemExit("the host closed")
        if mode != "receive":
            sock.sendall(block[:count])
        left -= count
    if mode == "receive":
        sock.sendall(b".")
    sock.recv(1)  # until the host has closed: a close of ours could overtake data in the device


main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
