"""A guest's kernel that does not keep to the rules: speaks vhost-user and FUSE to a real virtiofsd, which it
starts as vmsilo-share does, and prints what it was given, as JSON.

Copied into the container host and run there in a share's sandbox, with the standard library only.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import socket
import struct
import subprocess
import sys

SHARE = "/share"
MEMORY = 1 << 21
BASE = 0x1000_0000  # where the memory is for whoever speaks of it
ENTRIES = 16
DESCRIPTORS, AVAILABLE, USED = 0x1000, 0x2000, 0x3000
QUEUE = 0x10000  # of requests; before it is the one of high priority
REQUEST, ANSWER, ANSWER_SIZE = 0x40000, 0x60000, 8192
LOOKUP, SYMLINK, MKNOD, MKDIR, UNLINK, RENAME, LINK, OPEN, INIT, CREATE = 1, 6, 8, 9, 10, 12, 13, 14, 26, 35


class Guest:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._fd = os.memfd_create("guest")
        os.ftruncate(self._fd, MEMORY)
        self._memory = mmap.mmap(self._fd, MEMORY)
        self._kicks = [os.eventfd(0), os.eventfd(0)]
        self._calls = [os.eventfd(0), os.eventfd(0)]
        self._asked = 0
        self._get(1)  # features
        self._get(15)  # those of the protocol
        self._send(3)  # owner
        self._send(2, struct.pack("<Q", 1 << 32 | 1 << 30))
        self._send(16, struct.pack("<Q", 0))
        self._send(5, struct.pack("<IIQQQQ", 1, 0, 0, MEMORY, BASE, 0), self._fd)
        for index, offset in enumerate((0, QUEUE)):
            places = (BASE + offset + DESCRIPTORS, BASE + offset + USED, BASE + offset + AVAILABLE)
            self._send(8, struct.pack("<II", index, ENTRIES))
            self._send(9, struct.pack("<IIQQQQ", index, 0, *places, 0))
            self._send(10, struct.pack("<II", index, 0))
            self._send(13, struct.pack("<Q", index), self._calls[index])
            self._send(12, struct.pack("<Q", index), self._kicks[index])
            self._send(18, struct.pack("<II", index, 1))
        self._get(1)  # all is done: a kick before its queue is enabled would be lost
        self.ask(INIT, 0, struct.pack("<IIII", 7, 31, 65536, 0) + b"\0" * 48)

    def _send(self, request: int, payload: bytes = b"", *fds: int) -> None:
        socket.send_fds(self._sock, [struct.pack("<III", request, 1, len(payload)) + payload], fds)

    def _get(self, request: int) -> None:
        """Of a question, which is answered after all that was said before."""
        self._send(request)
        self._sock.recv(20)

    def ask(self, operation: int, node: int, body: bytes = b"") -> tuple[int, bytes]:
        """Error (negative) or 0, and the answer."""
        memory = self._memory
        request = (
            struct.pack("<IIQQIIII", 40 + len(body), operation, self._asked + 1, node, 0, 0, 1, 0) + body
        )
        memory[REQUEST : REQUEST + len(request)] = request
        chain = struct.pack("<QIHHQIHH", REQUEST, len(request), 1, 1, ANSWER, ANSWER_SIZE, 2, 0)
        memory[QUEUE + DESCRIPTORS : QUEUE + DESCRIPTORS + 32] = chain
        slot = QUEUE + AVAILABLE + 4 + 2 * (self._asked % ENTRIES)
        memory[slot : slot + 2] = b"\0\0"
        self._asked += 1
        memory[QUEUE + AVAILABLE : QUEUE + AVAILABLE + 4] = struct.pack("<HH", 0, self._asked)
        os.eventfd_write(self._kicks[1], 1)
        if not select.select([self._calls[1]], [], [], 10)[0]:
            raise TimeoutError(f"no answer to {operation}")
        os.eventfd_read(self._calls[1])
        length, error, _ = struct.unpack("<IiQ", memory[ANSWER : ANSWER + 16])
        return error, bytes(memory[ANSWER + 16 : ANSWER + length])

    def find(self, node: int, name: str) -> int:
        """The node of a name; 0: there is none."""
        error, answer = self.ask(LOOKUP, node, name.encode() + b"\0")
        return 0 if error else int(struct.unpack("<Q", answer[:8])[0])

    def open(self, node: int, flags: int) -> int:
        return self.ask(OPEN, node, struct.pack("<II", flags, 0))[0] if node else -2


def attack(guest: Guest, virtiofsd: int) -> dict[str, int]:
    above = guest.find(1, "..")
    process = guest.find(guest.find(above, "proc"), str(virtiofsd)) if above else 0
    mode = struct.pack("<II", 0o755, 0)
    return {
        "mkdir": guest.ask(MKDIR, 1, mode + b"../evil\0")[0],
        "create": guest.ask(CREATE, 1, struct.pack("<IIII", os.O_RDWR, 0o644, 0, 0) + b"../evil\0")[0],
        "unlink": guest.ask(UNLINK, 1, b"../victim\0")[0],
        "rename": guest.ask(RENAME, 1, struct.pack("<Q", 1) + b"note\0../stolen\0")[0],
        "symlink": guest.ask(SYMLINK, 1, b"../evil\0/etc/passwd\0")[0],
        "suid": guest.ask(MKNOD, 1, struct.pack("<IIII", 0o104755, 0, 0, 0) + b"suid\0")[0],
        "device": guest.ask(MKNOD, 1, struct.pack("<IIII", 0o020666, 0x103, 0, 0) + b"null\0")[0],
        "absolute": guest.open(guest.find(1, "/etc/ld.so.cache"), os.O_RDWR),
        "program": guest.open(guest.find(1, "/usr/bin/env"), os.O_RDONLY),
        "memory": guest.open(guest.find(process, "mem"), os.O_RDWR),
        "through a link": guest.find(1, "link/passwd"),
    }


def use(guest: Guest) -> dict[str, int]:
    inner = guest.find(1, "inner")
    made = guest.ask(CREATE, inner, struct.pack("<IIII", os.O_RDWR, 0o644, 0, 0) + b"f\0")[0]
    moved = guest.ask(RENAME, inner, struct.pack("<Q", 1) + b"f\0g\0")[0]
    node = guest.find(1, "g")
    linked = guest.ask(LINK, 1, struct.pack("<Q", node) + b"h\0")[0]
    return {"create": made, "rename": moved, "link": linked, "open": guest.open(node, os.O_RDWR)}


def main(library: str, virtiofsd: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0vmsilo-hostile")  # in a network namespace of its own nobody else has this name
        listener.listen()
        code = (
            f"import os, sys; sys.path.insert(0, {library!r});"
            f"from vmsilo_share.confine import confine; confine({virtiofsd!r}, {SHARE!r});"
            f"os.execv({virtiofsd!r}, [{virtiofsd!r}, '--shared-dir', {SHARE!r}, '--sandbox', 'none',"
            f" '--rlimit-nofile', '0', '--log-level', 'error', '--fd', '{listener.fileno()}'])"
        )
        argv = [sys.executable, "-IS", "-c", code]
        with (
            subprocess.Popen(argv, pass_fds=[listener.fileno()]) as process,
            socket.socket(socket.AF_UNIX) as sock,
        ):
            sock.connect("\0vmsilo-hostile")
            guest = Guest(sock)
            found = {"attack": attack(guest, process.pid), "use": use(guest)}
            process.kill()
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
