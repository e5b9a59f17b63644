"""ssh into a real guest over vsock: who gets in, who does not, and what of it is left."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.container import Container

KEYS = "/var/lib/vmsilo/ssh"
# What vm-shell does after its options.
ENTRY = """#!/usr/bin/python3 -IS
import sys
sys.path[:0] = ["/usr/local/lib/vmsilo/client", "/usr/local/lib/vmsilo/guest"]
from vmsilo import ssh
from vmsilo.errors import ClientError
from vmsilo.place import Place
site = "/usr/local/lib/vmsilo/venv/lib/python%d.%d/site-packages" % sys.version_info[:2]
place = Place("/usr/local/lib/vmsilo", site_dirs=(site, "/usr/lib/python3/dist-packages"))
root = sys.argv[1] == "--root"
name, *command = sys.argv[2 if root else 1 :]
try:
    sys.exit(ssh.main(name, root=root, command=command, place=place))
except ClientError as error:
    sys.exit(f"{error.fact}\\n{error.hint}")
"""


@pytest.fixture
def shell(demo: Container) -> Iterator[Container]:
    demo.write("/usr/local/bin/ssh-into", ENTRY, mode=0o755)
    yield demo
    deadline = time.monotonic() + 20
    while holders := demo.run("pgrep -af ssh-into", check=False).stdout:
        assert time.monotonic() < deadline, f"outlive ssh: {holders}"
        time.sleep(0.1)


def ssh(
    host: Container, *arguments: str, user: str = "user", check: bool = True
) -> subprocess.CompletedProcess[str]:
    return host.run(["ssh-into", *arguments], user=user, check=check, timeout=120)


def in_guest(host: Container, *command: str, check: bool = True) -> str:
    return host.run(["vm-run", "--root", "demo", *command], user="user", check=check).stdout


def test_the_user_logs_in(shell: Container) -> None:
    done = ssh(shell, "demo", "id -un; echo $XDG_RUNTIME_DIR; hostname; echo err >&2; exit 42", check=False)
    assert (done.returncode, done.stderr) == (42, "err\n")
    assert done.stdout == "user\n/run/user/1000\ndemo\n"


def test_root_logs_in(shell: Container) -> None:
    assert ssh(shell, "--root", "demo", "id", "-u").stdout == "0\n"
