"""The floors of throughput without a VM, over a Unix socket pair in blocks of 256 KiB.

argv: bare BYTES      one process sends zeroes, another receives them
      pipes           standard input to one process, the socket, another process, standard output
"""

import os
import socket
import sys

BLOCK = 256 * 1024


def bare(left: int) -> None:
    ours, theirs = socket.socketpair()
    block = memoryview(bytearray(BLOCK))
    if os.fork() == 0:
        ours.close()
        while left:
            left -= theirs.send(block[:left])
        os._exit(0)
    theirs.close()
    while ours.recv_into(block):
        pass
    os.wait()


def pipes() -> None:
    ours, theirs = socket.socketpair()
    block = memoryview(bytearray(BLOCK))
    if os.fork() == 0:
        ours.close()
        while count := os.readv(0, [block]):
            theirs.sendall(block[:count])
        os._exit(0)
    theirs.close()
    while count := ours.recv_into(block):
        written = 0
        while written < count:
            written += os.write(1, block[written:count])
    os.wait()


if sys.argv[1] == "bare":
    bare(int(sys.argv[2]))
else:
    pipes()
