"""vmsilo-share serve NAME: becomes the virtiofsd of one shared directory. vmsilo-share home PATH TEMPLATE:
makes a shared home.

Run by `vmsilo-NAME-share@TAG.service` and `vmsilo-NAME-home.service` with the rights of whom the files
belong to. `serve` sees the directory at /share and shows it to vmsilod, which compares it with the one that
it has checked: what systemd has mounted there by its path may have been another by then.
"""

from __future__ import annotations

import os
import sys

from vmsilo_launch.launch import LaunchError, ask, notify, place

from vmsilo_share.confine import confine
from vmsilo_share.home import HomeError, make_home

INSIDE = "/share"
USAGE = "usage: vmsilo-share serve NAME | vmsilo-share home PATH TEMPLATE"


def main(argv: list[str]) -> int:
    try:
        if len(argv) == 2 and argv[0] == "serve":
            serve(argv[1])
        elif len(argv) == 3 and argv[0] == "home":
            make_home(argv[1], argv[2])
        else:
            print(USAGE, file=sys.stderr)
            return 2
    except (LaunchError, HomeError) as error:
        print(f"<3>{error}", file=sys.stderr)
        return 1
    return 0


def serve(name: str) -> None:
    kept = take_listener()
    try:
        seen = os.open(INSIDE, os.O_PATH | os.O_DIRECTORY)
    except OSError as error:
        raise LaunchError(f"cannot open the shared directory: {error.strerror}") from error
    reply, fds = ask({"op": "share", "name": name, "listening": kept is not None}, [seen])
    os.close(seen)
    if kept is None:
        if os.environ.get("FDSTORE"):  # over the end of virtiofsd systemd keeps it, if the unit says so
            store(fds[0])
        place(fds, None)
    argv = [*reply["argv"], "--fd", "3"]
    try:
        confine(argv[0], INSIDE)
    except OSError as error:
        raise LaunchError(f"virtiofsd cannot be confined: {error}") from error
    notify("READY=1\nSTATUS=Serving")
    try:
        os.execve(argv[0], argv, {"LANG": "C.UTF-8", "PATH": "/usr/bin"})
    except OSError as error:
        raise LaunchError(f"{argv[0]} cannot be executed: {error.strerror}") from error


def take_listener() -> int | None:
    """sd_listen_fds(3): the listening socket of the last virtiofsd, at number 3."""
    # LISTEN_PID is not compared: in a process namespace of its own this process has two numbers, and nobody
    # but systemd starts it.
    if os.environ.get("LISTEN_FDS") != "1":
        return None
    os.set_inheritable(3, True)  # noqa: FBT003 - its own signature
    return 3


def store(fd: int) -> None:
    notify_fd("FDSTORE=1\nFDNAME=listener", fd)


def notify_fd(state: str, fd: int) -> None:
    import socket

    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        socket.send_fds(sock, [state.encode()], [fd])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
