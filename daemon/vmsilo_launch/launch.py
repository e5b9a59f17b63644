"""Turns a VM unit's first process into the VMM, and asks for the guest's shutdown when the unit stops.

Run by `vmsilo-NAME-vm.service` (`start NAME`, `stop NAME`) and `vmsilo-NAME-debug.service`, already under
the VM's own uid. It asks vmsilod over the control socket for argv, environment and descriptors, puts the
descriptors where argv says and executes the VMM, so the unit's main PID is the VMM. It decides nothing and
opens nothing but that socket.
"""

import fcntl
import json
import os
import select
import signal
import socket
import sys
import termios
from typing import Any

CONTROL = "/run/vmsilo/control.sock"
FD_BASE = 3  # received descriptor i is number FD_BASE + i in the VMM
MAX_FDS = 253  # SCM_MAX_FD: what one message can carry
MAX_REPLY = 1 << 20
ATTEMPTS = 5  # a crashed vmsilod is started again by its socket; a start outlives that many crashes
REPLY_TIMEOUT = 120.0
LOG_WRITER = "/usr/bin/cat"


class LaunchError(Exception):
    """Fact for the journal; `hint` says what to do."""

    def __init__(self, fact: str, hint: str = "") -> None:
        super().__init__(fact)
        self.hint = hint


def main(argv: list[str]) -> int:
    try:
        verb, name = argv
        if verb == "start":
            start(name)
        elif verb == "stop":
            stop(name)
        else:
            raise ValueError(verb)
    except ValueError:
        print("vmsilo-launch: usage: vmsilo-launch start|stop NAME", file=sys.stderr)
        return 2
    except LaunchError as error:
        print(f"<3>{error}", file=sys.stderr)
        if error.hint:
            print(f"<5>hint: {error.hint}", file=sys.stderr)
        return 1
    return 0


def start(name: str) -> None:
    log = start_log_writer()
    reply, fds = ask({"op": "prepare", "name": name}, [*find_command_socket(), log.fileno()])
    log.close()
    stdio = reply.get("stdio")
    place(fds, stdio)
    if reply.get("own_terminal"):
        take_terminal()
    argv, env = reply["argv"], reply["env"]
    notify("READY=1\nSTATUS=VMM started, guest boots")
    try:
        os.execve(argv[0], argv, env)
    except OSError as error:
        raise LaunchError(f"{argv[0]} cannot be executed: {error.strerror}") from error


def start_log_writer() -> socket.socket:
    """A stream into this unit's journal, for the lines of the guest's console. cat(1) at its other end
    writes them: the journal names a line after the unit of the process that wrote it.

    It ends when the stream does. SIGTERM, which systemd sends when the VMM is gone, does not end it before
    the last line is written. It is no child of the VMM and not in its process group: crosvm waits for all
    its children, and kills its group.
    """
    ours, its = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.dup2(its.fileno(), 0)
                os.dup2(sys.stderr.fileno(), 1)
                os.closerange(3, 256)
                os.execve(LOG_WRITER, [LOG_WRITER], {"LANG": "C"})
        finally:
            os._exit(0)  # whatever failed: this process is not to go on as a second launcher
    os.waitpid(child, 0)
    its.close()
    return ours


def stop(name: str) -> None:
    """ExecStop=: returns when the VMM is gone or the graceful deadline has passed; systemd ends what is
    left.
    """
    pid = int(os.environ.get("MAINPID") or 0)
    if not pid:
        return  # the VMM ended by itself
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    reply, _ = ask({"op": "stop", "name": name}, [])
    if reply.get("force"):
        return
    deadline = float(reply.get("deadline", 0))
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if not poll.poll(deadline * 1000):
        print(f"<4>the guest did not shut down in {deadline:.0f} s; ending the VMM", file=sys.stderr)


def ask(request: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
    """One request to vmsilod; tried again when the daemon died before it answered."""
    message = json.dumps(request).encode()
    for _ in range(ATTEMPTS):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(REPLY_TIMEOUT)
            try:
                sock.connect(CONTROL)
                socket.send_fds(sock, [message], fds)
                data, got, flags, _ = socket.recv_fds(sock, MAX_REPLY, MAX_FDS)
            except (ConnectionResetError, BrokenPipeError):
                continue
            except OSError as error:
                raise LaunchError(f"vmsilod does not answer: {error}", "systemctl status vmsilod") from error
        if not data:
            continue
        if flags & socket.MSG_CTRUNC:
            raise LaunchError("descriptors were lost on the way from vmsilod", "is LimitNOFILE= too low?")
        reply = json.loads(data)
        if "error" in reply:
            raise LaunchError(reply["error"]["message"], reply["error"].get("hint", ""))
        return reply, got
    raise LaunchError(f"vmsilod died each time it was asked to {request['op']}", "journalctl -u vmsilod")


def find_command_socket() -> list[int]:
    """The listening command socket that systemd passed, if this unit has one (sd_listen_fds)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    return list(range(3, 3 + int(os.environ.get("LISTEN_FDS", "0"))))


def take_terminal() -> None:
    """Standard input becomes the controlling terminal of this session, whose leader systemd made us. When
    vmsilo-consoled hangs it up, the VMM goes on.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    except OSError as error:
        raise LaunchError(f"the console cannot become the VMM's terminal: {error.strerror}") from error


def place(fds: list[int], stdio: list[int] | None) -> None:
    """Put received descriptor i at FD_BASE + i, but those whose indexes are in `stdio` (the last ones) only
    at 0, 1, 2; close all others.
    """
    first_free = max([FD_BASE + len(fds), *fds]) + 1
    high = []
    for index, fd in enumerate(fds):
        high.append(first_free + index)
        os.dup2(fd, first_free + index, inheritable=False)
    for number, index in enumerate(stdio or ()):
        os.dup2(high[index], number, inheritable=True)
    passed = [fd for index, fd in enumerate(high) if index not in (stdio or ())]
    for index, fd in enumerate(passed):
        os.dup2(fd, FD_BASE + index, inheritable=True)
    os.closerange(FD_BASE + len(passed), first_free + len(fds))


def notify(state: str) -> None:
    """sd_notify(3) to the unit's own NOTIFY_SOCKET."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        sock.send(state.encode())
