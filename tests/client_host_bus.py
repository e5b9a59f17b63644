"""A message bus of the tests' own, with a stand-in for vmsilod on it that answers from a table."""

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jeepney
import pytest
from client_host import site_dirs, write_program
from jeepney.io.blocking import DBusConnection, open_dbus_connection

CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><listen>unix:path={path}</listen><auth>EXTERNAL</auth>
<policy context="default">
<allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/><allow user="*"/>
</policy>
</busconfig>
"""
Completed = subprocess.CompletedProcess[bytes]
Reply = tuple[str, tuple[Any, ...]]  # a signature and values, or an error's name and its text


def vm(name: str, state: str = "running", **properties: tuple[str, Any]) -> dict[str, tuple[str, Any]]:
    return {
        "Name": ("s", name), "State": ("s", state), "Status": ("s", ""), "Color": ("s", "#ff0000"),
        "Memory": ("u", 2048), "Cpus": ("u", 4), "Vmm": ("s", "crosvm"), "RestartNeeded": ("b", False),
        "Problems": ("as", []), "Pid": ("u", 4711), "Uid": ("u", 61001), "Cid": ("u", 5), "Since": ("t", 0),
        "LastResult": ("s", ""), "AutoStart": ("b", False), "DependsOn": ("as", []),
        "Unit": ("s", f"vmsilo-{name}-vm.service"), **properties,
    }  # fmt: skip


class FakeDaemon:
    """`answers[method]` takes the call's values and gives a Reply; `calls` is what was asked."""

    def __init__(self, address: str) -> None:
        self.vms: list[dict[str, tuple[str, Any]]] = [vm("banking")]
        self.answers: dict[str, Callable[[Any], Reply]] = {
            "List": lambda _body: ("aa{sv}", (self.vms,)),
            "GetNetwork": lambda _body: ("aa{sv}", ([],)),
        }
        self.calls: list[tuple[str, Any]] = []
        self.seconds: dict[str, float] = {}  # that a method takes; others are answered meanwhile
        self.flags = 0
        self._connection: DBusConnection = open_dbus_connection(address, enable_fds=True)
        self._connection.send_and_get_reply(jeepney.message_bus.RequestName("org.vmsilo1"), timeout=10)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join(10)
        self._connection.close()

    def state_changed(self, name: str, state: str, reason: str = "") -> None:
        emitter = jeepney.DBusAddress("/org/vmsilo1", interface="org.vmsilo1.Manager")
        self._connection.send(jeepney.new_signal(emitter, "VmStateChanged", "sss", (name, state, reason)))

    def _serve(self) -> None:
        while not self._over.is_set():
            try:
                message = self._connection.receive(timeout=0.05)
            except TimeoutError:
                continue
            if message.header.message_type == jeepney.MessageType.method_call:
                self._answer(message)

    def _answer(self, message: jeepney.Message) -> None:
        method = message.header.fields[jeepney.HeaderFields.member]
        if method != "List":
            self.calls.append((method, message.body))
            self.flags = int(message.header.flags)
        if method in self.seconds:
            threading.Timer(self.seconds[method], self._reply, (message, method)).start()
        else:
            self._reply(message, method)

    def _reply(self, message: jeepney.Message, method: str) -> None:
        answer = self.answers.get(method, lambda _body: ("", ()))
        signature, values = answer(message.body)
        if signature.startswith("org."):
            self._connection.send(jeepney.new_error(message, signature, "s", values))
        else:
            self._connection.send(jeepney.new_method_return(message, signature or None, values))


@contextlib.contextmanager
def message_bus(directory: Path) -> Iterator[str]:
    """The address of a bus that lives as long as the block."""
    program = shutil.which("dbus-daemon")
    if program is None:
        pytest.skip("needs dbus-daemon")
    config = directory / "bus.conf"
    config.write_text(CONFIG.format(path=directory / "bus"))
    argv = [program, f"--config-file={config}", "--nofork", "--nopidfile", "--print-address=1"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, env={"PATH": os.environ["PATH"]})
    try:
        assert process.stdout is not None
        address = process.stdout.readline().decode().strip()
        assert address
        yield address
    finally:
        process.terminate()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def fake_daemon(address: str) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(address)
    try:
        yield daemon
    finally:
        daemon.close()


class Programs:
    """The installed programs, over a bus."""

    def __init__(self, directory: Path, address: str) -> None:
        self.directory = directory
        self.env = {"DBUS_SYSTEM_BUS_ADDRESS": address}

    def argv(self, program: str) -> list[str]:
        return write_program(self.directory, program, interpreter_path=site_dirs())

    def __call__(self, program: str, *args: str, stdin: bytes = b"") -> Completed:
        env = {**os.environ, **self.env}
        argv = [*self.argv(program), *args]
        return subprocess.run(argv, input=stdin, capture_output=True, timeout=60, check=False, env=env)
