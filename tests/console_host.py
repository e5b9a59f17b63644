"""A host for tests of vmsilo-consoled: the real process, with a manager, real terminals, journal streams and
clients around it.

Terminal stands in for a VMM (the slave side), Journal for journald's end of a unit's stream. The manager is
the relay tests' one. ConsoleHost ends everything it started and sees what consoled left open.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import tty
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay_host import PATIENCE, ROOT, SHIM, Control, Manager, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

READY = "READY=1\nSTATUS=Reading consoles"


class Terminal:
    """The VMM's side of a run's raw terminal."""

    def __init__(self) -> None:
        self.master, self.slave = os.openpty()
        tty.setraw(self.slave)

    def write(self, data: bytes) -> None:
        """Blocks while nobody reads the other side; fails when that lasts."""
        os.set_blocking(self.slave, False)
        deadline = time.monotonic() + PATIENCE
        while data:
            assert time.monotonic() < deadline, "the VMM stalls: its console is not read"
            if select.select([], [self.slave], [], 0.1)[1]:
                with contextlib.suppress(BlockingIOError):
                    data = data[os.write(self.slave, data) :]

    def read(self, count: int) -> bytes:
        data = b""
        deadline = time.monotonic() + PATIENCE
        while len(data) < count:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self.slave], [], [], left)[0], f"only {data[-200:]!r} came"
            data += os.read(self.slave, count - len(data))
        return data

    def end(self) -> None:
        if self.slave >= 0:
            os.close(self.slave)
            self.slave = -1

    def drop_master(self) -> None:
        if self.master >= 0:
            os.close(self.master)
            self.master = -1


class Journal:
    """journald's end of one stream."""

    def __init__(self) -> None:
        self.end, self.unit = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._data = b""

    def close(self) -> None:
        self.end.close()
        self.unit.close()

    def lines(self, count: int) -> list[bytes]:
        """The next `count` whole lines."""
        self.end.settimeout(PATIENCE)
        while self._data.count(b"\n") < count:
            part = self.end.recv(65536)
            assert part, f"the stream ended after {self._data!r}"
            self._data += part
        *found, self._data = self._data.split(b"\n", count)
        return found

    def drain(self) -> None:
        """Take what is there, so that there is room again."""
        with contextlib.suppress(BlockingIOError):
            while self.end.recv(65536, socket.MSG_DONTWAIT):
                pass

    def rest(self) -> bytes:
        """All until every holder of the unit's side has closed it."""
        self.unit.close()
        self.end.settimeout(PATIENCE)
        while part := self.end.recv(65536):
            self._data += part
        return self._data


class Client:
    """vm-shell's end of a console socket. `output` is what came as O, `marks` what came as anything else."""

    def __init__(self, path: Path, *, history: bool = True, write: str = "no", raw: bytes = b"") -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(path))
        self.output = b""
        with contextlib.suppress(BrokenPipeError):  # refused before it asked; the reason can be read
            self.sock.send(raw or b"A" + json.dumps({"history": history, "write": write}).encode())

    def packet(self) -> tuple[str, Any]:
        """The next packet; ("", None) is the end."""
        data = self.sock.recv(1 << 17)
        kind, body = data[:1].decode(), data[1:]
        if kind == "O":
            assert 1 <= len(body) <= 32768
            self.output += body
            return kind, body
        return kind, json.loads(body) if body else None

    def expect(self, kind: str) -> Any:
        """The body of the next packet that is not output."""
        while True:
            found, body = self.packet()
            if found != "O":
                assert found == kind, (found, body)
                return body

    def expect_output(self, end: bytes) -> bytes:
        while not self.output.endswith(end):
            kind, body = self.packet()
            assert kind == "O", (kind, body)
        return self.output

    def type(self, data: bytes) -> None:
        self.sock.send(b"I" + data)

    def finish(self) -> str:
        reason = str(self.expect("E")["reason"])
        assert self.sock.recv(10) == b""
        return reason

    def error(self) -> str:
        body = self.expect("X")
        assert set(body) == {"code", "message", "hint"}
        assert self.sock.recv(10) == b""
        return str(body["code"])


class ConsoleHost:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stack = contextlib.ExitStack()
        self.connections = contextlib.ExitStack()  # to consoled
        self.state = directory / "state"
        self.state.mkdir(mode=0o700)
        self.manager = Manager(directory / "notify")
        self.stack.callback(self.manager.close)
        self.listener = self.listen_at("console.sock")
        self.process: subprocess.Popen[bytes] | None = None
        self.log = directory / "log"
        self.baseline = 0

    def start(self, *limits: str) -> Control:
        """Start consoled as systemd would, with what the store holds; returns vmsilod's connection."""
        named = [("control", self.listener.fileno())]
        named += [(name, fd) for name, fds in self.manager.store.items() for fd in fds]
        names, numbers = ":".join(n for n, _ in named), ":".join(str(fd) for _, fd in named)
        ready = self.manager.messages.count(READY)
        shim = SHIM.replace("vmsilo_relay", "vmsilo_console")
        paths = [str(ROOT / "daemon"), str(ROOT / "guest")]
        options = [word for limit in limits for word in ("--limit", limit)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", shim, *paths, names, numbers, *options],
                pass_fds=[fd for _, fd in named],
                stderr=log,
                env={"NOTIFY_SOCKET": str(self.manager.path), "RUNTIME_DIRECTORY": str(self.state)},
            )
        wait_until(lambda: self.manager.messages.count(READY) > ready or self.is_dead(), "READY=1")
        assert not self.is_dead(), self.log.read_text()
        if not self.baseline:
            self.baseline = self.count_fds()
        return self.control()

    def control(self) -> Control:
        control = Control(self.directory / "console.sock")
        self.connections.callback(control.sock.close)
        return control

    def listen_at(self, name: str) -> socket.socket:
        path = self.directory / name
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.stack.callback(sock.close)
        sock.bind(str(path))
        sock.listen(64)
        return sock

    def listen(self, control: Control, name: str = "banking", owner: int = 1000) -> None:
        sock = self.listen_at(f"{name}-console")
        assert control.call("listen", [sock.fileno()], name=name, owner=owner) == {"ok": True}

    def open(
        self, control: Control, name: str = "banking", generation: str = "g1", journal: Journal | None = None
    ) -> Terminal:
        """A run begins: what vmsilod does, which keeps no master side."""
        terminal = Terminal()
        self.stack.callback(terminal.end)
        fds, kinds = [terminal.master], ["master"]
        if journal is not None:
            fds.append(journal.unit.fileno())
            kinds.append("journal")
        assert control.call("open", fds, name=name, generation=generation, fds=kinds) == {"ok": True}
        terminal.drop_master()
        return terminal

    def journal(self) -> Journal:
        journal = Journal()
        self.stack.callback(journal.close)
        return journal

    def client(
        self, name: str = "banking", *, history: bool = True, write: str = "no", raw: bytes = b""
    ) -> Client:
        client = Client(self.directory / f"{name}-console", history=history, write=write, raw=raw)
        self.connections.callback(client.sock.close)
        return client

    def attached(self, *, history: bool = True, write: str = "no") -> Client:
        """A client that has got its first answer and all of its scroll-back."""
        client = self.client(history=history, write=write)
        assert client.expect("S")["running"]
        client.expect("H")
        return client

    def is_dead(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def kill(self, number: int = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def count_fds(self) -> int:
        assert self.process is not None
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def close(self) -> None:
        if not self.is_dead():
            self.kill()
        self.connections.close()
        self.stack.close()

    def assert_nothing_left(self) -> None:
        """Forget all VMs, hang up everywhere, and see that consoled has the descriptors it began with."""
        control = self.control()
        for vm in control.call("list")["vms"]:
            assert control.call("forget", name=vm["name"]) == {"ok": True}
        assert list(self.state.iterdir()) == []
        self.connections.close()
        wait_until(lambda: self.count_fds() == self.baseline, f"{self.baseline} open descriptors")
        wait_until(lambda: self.manager.store == {}, "an empty descriptor store")
        assert "Traceback" not in self.log.read_text()
        assert "Error" not in self.log.read_text()


@contextlib.contextmanager
def run_host(directory: Path) -> Iterator[ConsoleHost]:
    """A host whose consoled must be alive, quiet and without a leftover descriptor when the test is done."""
    host = ConsoleHost(directory)
    try:
        yield host
        host.assert_nothing_left()
    finally:
        host.close()
