"""ssh into a guest over kernel vsock, where every process of the host can reach the guest's port."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.conftest import Host

ENTRY = """#!/usr/bin/python3 -IS
import sys
sys.path[:0] = ["/usr/local/lib/vmsilo/client", "/usr/local/lib/vmsilo/guest"]
from vmsilo import ssh
from vmsilo.place import Place
site = "/usr/local/lib/vmsilo/venv/lib/python%d.%d/site-packages" % sys.version_info[:2]
place = Place("/usr/local/lib/vmsilo", site_dirs=(site, "/usr/lib/python3/dist-packages"))
root = sys.argv[1] == "--root"
name, *command = sys.argv[2 if root else 1 :]
sys.exit(ssh.main(name, root=root, command=command, place=place))
"""
# systemd's own way to a vsock port, open to whoever has a key.
DIRECT = "-o ProxyCommand='/usr/lib/systemd/systemd-ssh-proxy vsock/{cid} 22' -o ProxyUseFdpass=yes"


@pytest.fixture(scope="module")
def vm(host: Host) -> Iterator[str]:
    entry = Path("/usr/local/bin/ssh-into")
    entry.write_text(ENTRY)
    entry.chmod(0o755)
    with host.vm("logins", "memory = 768\nstart_timeout = 600\n") as name:
        yield name
    host.wait_until("! test -e /var/lib/vmsilo/ssh/logins", seconds=20)
    entry.unlink()


def test_user_and_root_log_in(host: Host, vm: str) -> None:
    assert host.read(f"ssh-into {vm} 'id -un; cat /sys/class/dmi/id/sys_vendor; ls /dev/vsock'", user="user")
    assert host.read(f"ssh-into --root {vm} id -u", user="user") == "0"
    assert int(host.vms()[vm]["Cid"]) > 2
    assert not os.path.exists(f"/run/vmsilo/vm/{vm}/vsock")  # noqa: PTH110 - no hybrid device stands in


def test_a_stranger_reaches_sshd_and_no_further(host: Host, vm: str) -> None:
    host.run(f"vm-start --wait {vm}", user="user")
    cid = host.vms()[vm]["Cid"]
    home = Path(tempfile.mkdtemp())
    shutil.chown(home, "mallory")
    host.run(f"ssh-keygen -q -t ed25519 -N '' -f {home}/key", user="mallory")
    hosts = (
        f"-o UserKnownHostsFile={home}/known -o StrictHostKeyChecking=accept-new -F none -o BatchMode=yes"
    )
    for login in ("user", "root"):
        command = f"ssh -o BatchMode=yes {hosts} -i {home}/key {DIRECT.format(cid=cid)} -l {login} guest id"
        done = host.run(command, user="mallory", check=False)
        assert done.returncode == 255
        assert "Permission denied (publickey)" in done.stderr, done.stderr
    shown = (home / "known").read_text().split()[1:3]
    assert shown == Path(f"/var/lib/vmsilo/ssh/{vm}/host.pub").read_text().split()[:2]
    shutil.rmtree(home)
