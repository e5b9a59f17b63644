"""vm-shell --ssh: what ssh is started with, and how the connection gets to it."""

from __future__ import annotations

import itertools
import os
import select
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from vmsilo import ssh
from vmsilo.errors import ClientError

if TYPE_CHECKING:
    from pathlib import Path

FILES = ("/proc/7/fd/5", "/proc/7/fd/6")
# Stands where ssh stands: runs the ProxyCommand as ssh does, and reads from the connection that it passes.
AS_SSH = r"""
import os, socket, subprocess, sys
options = dict(word.split("=", 1) for flag, word in zip(sys.argv, sys.argv[1:]) if flag == "-o")
ours, theirs = socket.socketpair()
argv = [os.environ["SHELL"], "-c", "exec " + options["ProxyCommand"].replace("%%", "%")]
done = subprocess.run(argv, stdin=theirs, stdout=theirs)
theirs.close()
data, fds, _, _ = socket.recv_fds(ours, 1, 1)
stream = socket.socket(fileno=fds[0])
key = open(sys.argv[sys.argv.index("-i") + 1]).read()
known = open(options["UserKnownHostsFile"]).read()
print(repr((done.returncode, data, stream.recv(100), key, known, sorted(os.environ))))
stream.sendall(b"seen")
sys.exit(7)
"""


def plan(**changes: object) -> list[str]:
    given: dict[str, object] = {
        "login": "anna",
        "files": FILES,
        "proxy": "exec pass",
        "command": [],
        "terminal": False,
    }
    return ssh.plan_argv("banking", **{**given, **changes})  # type: ignore[arg-type]  # changed on purpose


def test_a_hostile_guest_is_given_nothing() -> None:
    argv = plan()
    options = dict(word.split("=", 1) for flag, word in itertools.pairwise(argv) if flag == "-o")
    assert argv[1:3] == ["-F", "none"]
    for closed in ("ForwardAgent", "ForwardX11", "PermitLocalCommand", "UpdateHostKeys", "VerifyHostKeyDNS"):
        assert options[closed] == "no"
    for closed in ("GlobalKnownHostsFile", "IdentityAgent", "ControlPath"):
        assert options[closed] == "none"
    assert options["StrictHostKeyChecking"] == "yes"
    assert options["UserKnownHostsFile"] == FILES[1]
    assert options["HostKeyAlias"] == "banking.vmsilo"
    assert argv[argv.index("-i") + 1] == FILES[0]


def test_the_command_stays_behind_the_name() -> None:
    argv = plan(command=["-oProxyCommand=evil", "x"], terminal=True)
    assert argv[argv.index("--") :] == ["--", "banking", "-oProxyCommand=evil", "x"]
    assert argv.count("-t") == 1
    assert "-T" in plan()


@pytest.mark.skipif(shutil.which("ssh") is None, reason="needs ssh")
def test_ssh_knows_every_option() -> None:
    done = subprocess.run(
        ["ssh", "-G", *plan(files=("/dev/null",) * 2)[1:]], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    seen = done.stdout.splitlines()
    assert "user anna" in seen
    assert "clearallforwardings yes" in seen
    assert not [line for line in seen if line.startswith("sendenv")]


def test_the_proxy_line_survives_odd_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "PASSER", "/a b/it's 100%/ssh_pass.py")
    line = "printf '%s\\n' " + ssh.plan_proxy("address").replace("%%", "%")
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == ["-IS", "/a b/it's 100%/ssh_pass.py", "address"]


def test_ssh_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClientError) as caught:
        ssh.find_program("ssh")
    assert "openssh-client" in caught.value.hint


def test_connection_key_and_host_reach_ssh(tmp_path: Path) -> None:
    """The whole way, with a program in the place of ssh that does the same with what it is given."""
    program = tmp_path / "ssh"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{AS_SSH}' \"$@\"\n")
    program.chmod(0o755)
    guest, stream = socket.socketpair()
    guest.settimeout(20)
    entry = (
        "import os, sys\n"
        f"sys.path[:0] = {[p for p in sys.path if p.endswith(('client', 'guest'))]!r}\n"
        "from vmsilo import ssh\n"
        "from vmsilo.place import Place\n"
        "key = os.memfd_create('key'); os.write(key, b'private')\n"
        f"login = ssh.Login({stream.fileno()}, key, 'anna', 'ssh-ed25519 AAAA')\n"
        "ssh.ask_login = lambda name, place, root: login\n"
        "sys.exit(ssh.main('banking', root=False, command=['id'], place=Place()))\n"
    )
    with guest, stream:
        guest.sendall(b"SSH-2.0-guest")
        environ = {
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SSH_AUTH_SOCK": "/x",
            "LC_ALL": "C.UTF-8",
            "ANY": "1",
        }
        process = subprocess.Popen(
            [sys.executable, "-c", entry],
            stdout=subprocess.PIPE,
            pass_fds=[stream.fileno()],
            env=environ,
            text=True,
        )
        stream.close()
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 7
        status, data, said, key, known, variables = eval(out)
        assert (status, data, said, key) == (0, b"\0", b"SSH-2.0-guest", "private")
        assert known == "banking.vmsilo ssh-ed25519 AAAA\n"
        assert {"SSH_AUTH_SOCK", "ANY"}.isdisjoint(variables)
        assert guest.recv(10) == b"seen"
        # The holder ends with ssh: nobody has the connection any more.
        assert select.select([guest], [], [], 10)[0]
        assert guest.recv(10) == b""


def test_the_holder_passes_nothing_to_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"\0vmsilo-test-{os.getpid()}")
        listener.listen(1)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
            stranger.connect(listener.getsockname())
            monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
            assert not ssh.pass_stream(listener, theirs.fileno())
            assert stranger.recv(10) == b""
