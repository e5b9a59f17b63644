"""The launcher against a real control socket: what it sends, where descriptors end up, what it says when
refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from vmsilo_launch import launch

if TYPE_CHECKING:
    from collections.abc import Callable

REPO = Path(__file__).resolve().parents[2]
RUN = """
import sys
sys.path.insert(0, {path!r})
from vmsilo_launch import launch
launch.CONTROL = {control!r}
sys.exit(launch.main({argv!r}))
"""
SHOW_FDS = """
import os, sys
numbers = sorted(int(fd) for fd in os.listdir('/proc/self/fd'))
print(sys.argv[1:], [fd for fd in numbers if fd > 2][:-1])
for fd in map(int, sys.argv[1:]): print(os.pread(fd, 100, 0).decode())
print(os.environ.get("COLOR"), os.environ.get("HOME"))
"""
Answer = tuple[dict[str, Any], list[int]]


class ControlSocket:
    """Answers each connection with what `answer(request)` returns; None closes without an answer."""

    def __init__(self, path: Path, answer: Callable[[dict[str, Any]], Answer | None]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.passed: list[int] = []  # the descriptors of the last request, as long as it is open
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                data, fds, _, _ = socket.recv_fds(sock, 4096, 4)
                self.forget()
                self.passed = fds
                self.requests.append({**json.loads(data), "fds": len(fds)})
                reply = self._answer(self.requests[-1])
                if reply is not None:
                    socket.send_fds(sock, [json.dumps(reply[0]).encode()], reply[1])

    def forget(self) -> None:
        passed, self.passed = self.passed, []
        for fd in passed:
            os.close(fd)

    def close(self) -> None:
        self.forget()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


def run_launcher(
    tmp_path: Path, argv: list[str], answer: Callable[[dict[str, Any]], Answer | None], env: dict[str, str]
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    control = ControlSocket(tmp_path / "control.sock", answer)
    try:
        with subprocess.Popen(
            launcher(tmp_path, argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        ) as process:
            process.wait(30)
            control.forget()  # the log writer has standard error until then
            out, errors = process.communicate(timeout=30)
    finally:
        control.close()
    return subprocess.CompletedProcess(argv, process.returncode, out, errors), control.requests


def launcher(tmp_path: Path, argv: list[str]) -> list[str]:
    script = RUN.format(path=str(REPO / "daemon"), control=str(tmp_path / "control.sock"), argv=argv)
    return [sys.executable, "-I", "-c", script]


def find_writers(errors: int) -> list[Path]:
    """The processes, but ours, that have standard error's other side."""
    pipe = Path(f"/proc/self/fd/{errors}").readlink()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(process.name) != os.getpid() and (process / "fd/2").readlink() == pipe:
                found.append(process)
    return found


def memory_file(text: str) -> int:
    fd = os.memfd_create("test")
    os.write(fd, text.encode())
    return fd


def test_descriptors_arrive_at_the_numbers_in_argv(tmp_path: Path) -> None:
    files = [memory_file(f"file {number}") for number in range(3)]
    reply = {
        "argv": [sys.executable, "-I", "-c", SHOW_FDS, "3", "4", "5"],
        "env": {"COLOR": "red"},
        "stdio": [],
    }
    done, requests = run_launcher(
        tmp_path, ["start", "banking"], lambda _: (reply, files), {"HOME": "/root"}
    )
    for fd in files:
        os.close(fd)
    assert done.stdout.splitlines() == [
        "['3', '4', '5'] [3, 4, 5]",
        "file 0",
        "file 1",
        "file 2",
        "red None",
    ]
    assert requests == [{"op": "prepare", "name": "banking", "fds": 1}]


def test_the_log_writer_outlives_the_vmm(tmp_path: Path) -> None:
    """It has none of the VMM's descriptors, is no child of it, and the unit's SIGTERM does not end it."""
    disk = memory_file("the VMM's")
    show_children = "read children < /proc/$$/task/$$/children; echo children: $children"
    reply = {"argv": ["/bin/sh", "-c", show_children], "env": {}, "stdio": []}
    control = ControlSocket(tmp_path / "control.sock", lambda _: (reply, [disk]))
    try:
        with subprocess.Popen(
            launcher(tmp_path, ["start", "banking"]), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.read() == b"children:\n"
            assert process.wait(30) == 0
            (writer,) = find_writers(process.stderr.fileno())
            deadline = time.monotonic() + 10
            while (writer / "comm").read_text() != "cat\n":  # it was forked, and executes cat a moment later
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert sorted(fd.name for fd in (writer / "fd").iterdir()) == ["0", "1", "2"]
            os.kill(int(writer.name), signal.SIGTERM)
            os.write(control.passed[0], b"<6>console: last words\n")
            control.forget()
            assert process.stderr.read() == b"<6>console: last words\n"
    finally:
        control.close()
        os.close(disk)


def test_terminals_become_standard_input_and_output(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    other = memory_file("x")
    reply = {"argv": ["/bin/sh", "-c", "echo to the console"], "env": {}, "stdio": [1, 1, 1]}
    done, _ = run_launcher(tmp_path, ["start", "banking"], lambda _: (reply, [other, writer]), {})
    os.close(writer)
    os.close(other)
    with open(reader) as pipe:  # noqa: PTH123 - a descriptor, not a path
        assert pipe.read() == "to the console\n"
    assert done.stdout == ""


def test_a_vmm_that_wants_it_has_its_console_as_controlling_terminal(tmp_path: Path) -> None:
    ours, its = os.openpty()
    show = (
        "import os, signal; print(os.tcgetpgrp(0) == os.getpgrp(), signal.getsignal(signal.SIGHUP),"
        " file=open('/dev/tty', 'w'))"
    )
    reply = {"argv": [sys.executable, "-c", show], "env": {}, "stdio": [0, 0], "own_terminal": True}
    control = ControlSocket(tmp_path / "control.sock", lambda _: (reply, [its]))
    try:
        done = subprocess.run(launcher(tmp_path, ["start", "banking"]), start_new_session=True, check=False)
        assert done.returncode == 0
        assert os.read(ours, 200).decode().strip() == "True 1"
    finally:
        control.close()
        os.close(ours)
        os.close(its)


def test_a_refusal_is_a_fact_and_a_hint(tmp_path: Path) -> None:
    error = {"error": {"code": "start-failed", "message": "image 'x' is missing", "hint": "build it"}}
    done, _ = run_launcher(tmp_path, ["start", "banking"], lambda _: (error, []), {})
    assert done.returncode == 1
    assert done.stderr == "<3>image 'x' is missing\n<5>hint: build it\n"


def test_a_daemon_that_dies_is_asked_again(tmp_path: Path) -> None:
    reply = {"argv": ["/bin/echo", "started"], "env": {}, "stdio": []}
    answers: list[Answer | None] = [None, None, (reply, [])]
    done, requests = run_launcher(tmp_path, ["start", "banking"], lambda _: answers.pop(0), {})
    assert done.stdout == "started\n"
    assert len(requests) == 3


def test_a_daemon_that_always_dies_is_given_up(tmp_path: Path) -> None:
    done, requests = run_launcher(tmp_path, ["start", "banking"], lambda _: None, {})
    assert done.returncode == 1
    assert "vmsilod died each time" in done.stderr
    assert len(requests) == launch.ATTEMPTS


def test_a_missing_program_is_told(tmp_path: Path) -> None:
    reply = {"argv": ["/nonexistent/crosvm"], "env": {}, "stdio": []}
    done, _ = run_launcher(tmp_path, ["start", "banking"], lambda _: (reply, []), {})
    assert done.returncode == 1
    assert done.stderr.startswith("<3>/nonexistent/crosvm cannot be executed")


def test_stop_waits_for_the_vmm(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as vmm:

        def end_it(_: dict[str, Any]) -> Answer:
            vmm.terminate()
            threading.Thread(target=vmm.wait).start()
            return {"ok": True, "force": False, "deadline": 30}, []

        done, requests = run_launcher(tmp_path, ["stop", "banking"], end_it, {"MAINPID": str(vmm.pid)})
    assert done.returncode == 0
    assert requests[0]["op"] == "stop"


def test_stop_gives_up_at_the_deadline(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as vmm:
        try:
            reply = {"ok": True, "force": False, "deadline": 0.2}
            done, _ = run_launcher(
                tmp_path, ["stop", "banking"], lambda _: (reply, []), {"MAINPID": str(vmm.pid)}
            )
        finally:
            vmm.kill()
    assert "did not shut down" in done.stderr


@pytest.mark.parametrize("argv", [[], ["start"], ["begin", "banking"], ["start", "a", "b"]])
def test_wrong_usage(argv: list[str]) -> None:
    assert launch.main(argv) == 2
