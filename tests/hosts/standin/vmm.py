#!/usr/bin/python3 -IS
"""Stand-in for qemu-system-x86_64: takes its command line, its descriptors and QMP, and "boots" guest.py.

Installed in the test host's /usr/local/bin, where vmsilod finds it before the real one. The guest is a
child process, so it dies with its VM's unit as a guest does with its VMM. SIGUSR1 is the guest's own power
off, SIGUSR2 its kernel panic. kernel_params choose how VM and guest behave:

    standin.mode=exit-N        the VMM fails with status N before the guest runs
    standin.mode=crash         the VMM dumps core before the guest runs
    standin.mode=early-panic   the guest panics while it boots, before it said a word
    standin.mode=late-panic    the guest panics when it has been ready for a moment
    standin.mode=hog           the VMM takes memory without end
    standin.mode=deaf          the guest takes every request to power off, and stays
    standin.mode=stubborn      the same, and the VMM ignores SIGTERM as well
    standin.mode=...           see guest.py
    standin.delay=SECONDS      the guest's boot takes that long
"""

import array
import contextlib
import itertools
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

GUEST = "/usr/local/lib/standin/guest.py"
GUEST_DIR = Path("/tmp/guest")  # the unit's PrivateTmp
CPIO_HEADER = 110

guests: list[int] = []


class Machine:
    """What the command line says."""

    def __init__(self, argv: list[str]) -> None:
        options = dict(itertools.pairwise(argv))
        self.kernel = options["-kernel"]
        self.initrd = options["-initrd"]
        self.params = options["-append"].split()
        self.console = any(word.startswith("stdio,") for word in argv)
        self.monitor_fd, self.vhost = -1, ""
        for word in argv:
            pairs = dict(part.partition("=")[::2] for part in word.split(","))
            if pairs.get("id") == "mon0":
                self.monitor_fd = int(pairs["fd"])
            elif pairs.get("id") == "vsock0":
                self.vhost = pairs["path"]
        self.name = self.param("systemd.hostname")
        self.mode = self.param("standin.mode")
        self.delay = float(self.param("standin.delay") or 0)

    def param(self, key: str) -> str:
        found = [word.partition("=")[2] for word in self.params if word.partition("=")[0] == key]
        return found[-1] if found else ""


def list_fds() -> dict[int, str]:
    """What was passed, for tests that look at it in the journal."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208 - a Path would open a descriptor of its own
        try:
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")  # noqa: PTH115 - as above
        except OSError:
            continue  # the one that listed them
    return found


def read_secret(initrd: bytes) -> str:
    """From the cpio archive (newc) that the host appended to the image's initrd."""
    start = initrd.rindex(b"vmsilo/secret\0") - CPIO_HEADER
    header = initrd[start : start + CPIO_HEADER]
    assert header.startswith(b"070701"), header
    size, name_size = int(header[54:62], 16), int(header[94:102], 16)
    begin = (start + CPIO_HEADER + name_size + 3) // 4 * 4
    return initrd[begin : begin + size].decode().strip()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def plug_in_vsock(machine: Machine) -> socket.socket:
    """Give the device a way to the guest's folder, as vhost-user gives it the guest's memory."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(machine.vhost)
    folder = os.open(GUEST_DIR, os.O_PATH | os.O_DIRECTORY)
    sock.sendmsg([b"guest"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [folder]))])
    os.close(folder)
    return sock


def start_guest(machine: Machine, secret: str) -> None:
    host_port = str(Path(machine.vhost).with_name("vsock_701"))
    settings = {"secret": secret, "host_port": host_port, "mode": machine.mode, "delay": machine.delay}
    settings |= {"vmm": os.getpid(), "name": machine.name, "folder": str(GUEST_DIR)}
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.execv("/usr/bin/python3", ["python3", "-IS", GUEST, json.dumps(settings)])
    with contextlib.suppress(PermissionError):  # it was faster, and has executed already
        os.setpgid(pid, pid)
    guests.append(pid)


class Monitor:
    """QMP, as far as vmsilod speaks it: one client at a time."""

    def __init__(self, fd: int, machine: Machine) -> None:
        self._listener = socket.socket(fileno=fd)
        self._machine = machine

    def fileno(self) -> int:
        return self._listener.fileno()

    def serve(self) -> None:
        sock, _ = self._listener.accept()
        # A vmsilod that is killed hangs up at any point, and a VMM does not mind.
        with contextlib.suppress(ConnectionError), sock, sock.makefile("rw") as stream:
            self._send(stream, {"QMP": {"version": {}, "capabilities": []}})
            for line in stream:
                command = json.loads(line)["execute"]
                self._send(stream, {"return": {}})
                if command == "quit":
                    leave(0, "quit by QMP")
                if command == "system_powerdown":
                    say("power button")
                    if self._machine.mode not in ("deaf", "stubborn"):
                        leave(0, "the guest took the power button")

    @staticmethod
    def _send(stream: Any, message: dict[str, Any]) -> None:
        stream.write(json.dumps(message) + "\n")
        stream.flush()


def leave(status: int, why: str) -> None:
    for guest in guests:
        os.killpg(guest, signal.SIGKILL)  # it ends without a word, as a guest does with its VMM
    say(f"standin leaves with {status}: {why}")
    os._exit(status)


def eat_memory() -> None:
    eaten = []
    while True:
        eaten.append(b"x" * (1 << 20))


def handle_signals(mode: str) -> None:
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: leave(0, "SIGTERM"))
    on_alarm = eat_memory if mode == "hog" else lambda: leave(1, "the guest's kernel panicked")
    signal.signal(signal.SIGALRM, lambda *_: on_alarm())
    signal.signal(signal.SIGUSR1, lambda *_: leave(0, "the guest powered off"))
    signal.signal(signal.SIGUSR2, lambda *_: leave(1, "the guest's kernel panicked"))


def fail_early(mode: str) -> None:
    if mode.startswith("exit-"):
        leave(int(mode.removeprefix("exit-")), "as told")
    if mode == "crash":
        os.abort()


def show_console(typed: bool) -> None:  # noqa: FBT001
    if typed:
        keys = os.read(0, 4096)
        os.write(1, b"typed: " + keys.upper() + b"\r\n")
    else:
        os.write(1, b"\x1b]0;hostile title\x07standin: the guest's console\r\n")


def main() -> None:
    fds = list_fds()
    machine = Machine(sys.argv)
    say("standin fds: " + json.dumps(fds))
    fail_early(machine.mode)
    handle_signals(machine.mode)
    GUEST_DIR.mkdir(exist_ok=True)
    (GUEST_DIR / "vmm").write_text(str(os.getpid()))
    device = plug_in_vsock(machine)
    if machine.console:
        show_console(typed=False)
    start_guest(machine, read_secret(Path(machine.initrd).read_bytes()))
    monitor = Monitor(machine.monitor_fd, machine)
    if machine.mode in ("early-panic", "hog"):
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    watched: list[Any] = [monitor, device, *([0] if machine.console else [])]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if monitor in ready:
            monitor.serve()
        if device in ready:
            leave(1, "the vsock device is gone")
        if 0 in ready:
            show_console(typed=True)


if __name__ == "__main__":
    main()
