"""Stand-in for a guest: what its PID 1 says to the host, and the real guest agent, or a hostile one.

Started by vmm.py with its settings as JSON. In the guest's user database, `user` and `root` are the uid that
it runs as. Hostile agents, chosen by standin.mode:

    garbage       answers with noise
    giant         announces a frame of 4 GiB
    escapes       refuses the command with a message full of terminal control sequences
    silent        takes everything and never answers
    half-close    says that the command was started, and closes its direction
    flood         never stops sending output
    lies          acknowledges input that was never sent
    chatter       floods the host's port with messages, good and bad, and goes on as an ordinary guest
    never-ready   an ordinary agent, but PID 1 never says that the guest is ready
    no-agent      PID 1 says that it is ready; no agent is there
    dying-agent   the agent goes away when the guest was ready
"""

import contextlib
import json
import os
import pwd
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path[:0] = ["/usr/local/lib/vmsilo/guest"]
HOSTILE = ("garbage", "giant", "escapes", "silent", "half-close", "flood", "lies")
STARTED, STDOUT, ERROR, CONSUMED = 16, 17, 20, 21


def tell_host(settings: dict[str, Any], text: str) -> None:
    """Once: as systemd's PID 1, which goes on when nobody hears it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(settings["host_port"])
        sock.sendall(text.encode())
        sock.recv(1)


def act_as_pid_1(settings: dict[str, Any]) -> None:
    """In a process of its own: the agent must stay single-threaded."""
    tell_host(settings, "X_SYSTEMD_UNIT_ACTIVE=basic.target\n")
    time.sleep(settings["delay"])
    if settings["mode"] == "chatter":
        chatter(settings)
    if settings["mode"] != "never-ready":
        tell_host(settings, f"READY=1\nSTATUS=stand-in guest {settings['name']} is up\n")
    if settings["mode"] == "late-panic":
        time.sleep(0.5)
        os.kill(settings["vmm"], 12)


def chatter(settings: dict[str, Any]) -> None:
    kept = []
    for number in range(600):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(settings["host_port"])
        with contextlib.suppress(OSError):
            sock.sendall((f"STATUS=\x1b]0;{number}\x07" + "x" * 8000 * (number % 2) + "\n").encode())
        if number % 10 == 0:
            idle = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            idle.connect(settings["host_port"])
            kept.append(idle)
        sock.close()


def frame(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BI", kind, len(payload)) + payload


def be_hostile(sock: socket.socket, mode: str) -> None:
    with sock, contextlib.suppress(OSError):
        sock.recv(65536)
        started = frame(STARTED, b'{"pid":1}')
        if mode == "garbage":
            sock.sendall(bytes(range(256)) * 1024)
        elif mode == "giant":
            sock.sendall(started + struct.pack(">BI", STDOUT, 0xFFFFFFFF) + b"x" * 65536)
        elif mode == "escapes":
            text = "no\x1b]0;pwned\x07\x1b[2J\x1b[6n\u202eevil\nsecond line\x9b31m"
            sock.sendall(frame(ERROR, json.dumps({"code": "failed", "message": text}).encode()))
        elif mode == "lies":
            sock.sendall(started + frame(CONSUMED, struct.pack(">I", 1 << 31)))
        elif mode == "half-close":
            sock.sendall(started)
            sock.shutdown(socket.SHUT_WR)
        elif mode == "flood":
            sock.sendall(started)
            while True:
                sock.sendall(frame(STDOUT, b"y\n" * 8192))
        while sock.recv(65536):
            pass


def run_hostile_agent(settings: dict[str, Any]) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{settings['folder']}/agent")
    listener.listen(128)
    tell_host(settings, "X_VMSILO_AGENT=1\nX_VMSILO_READY_FROM=systemd\n")
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=be_hostile, args=(sock, settings["mode"]), daemon=True).start()


def run_agent(settings: dict[str, Any]) -> None:
    from vmsilo_agent.main import main

    uid, gid = os.getuid(), os.getgid()

    def find_user(name: str) -> pwd.struct_passwd:
        if name not in ("user", "root"):
            raise KeyError(name)
        return pwd.struct_passwd((name, "x", uid, gid, name, "/tmp", "/bin/sh"))

    pwd.getpwnam = find_user
    os.getgrouplist = lambda _name, group: [group]
    secret = Path(settings["folder"], "secret")
    secret.write_text(settings["secret"])
    stays = settings["mode"] in ("deaf", "stubborn")
    main(
        [
            f"--listen=unix:{settings['folder']}/agent",
            f"--announce=unix:{settings['host_port']}",
            f"--secret-file={secret}",
            f"--systemctl={Path(__file__).with_name('systemctl')}",
            "--poweroff-command",
            "true" if stays else f"/bin/kill -USR1 {settings['vmm']}",
        ]
    )


def main() -> None:
    settings = json.loads(sys.argv[1])
    if os.fork() == 0:
        act_as_pid_1(settings)
        os._exit(0)
    if settings["mode"] in HOSTILE:
        run_hostile_agent(settings)
    elif settings["mode"] != "no-agent":
        if settings["mode"] == "dying-agent":
            signal.alarm(1)
        run_agent(settings)


if __name__ == "__main__":
    main()
