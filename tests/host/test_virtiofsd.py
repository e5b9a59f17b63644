"""A real virtiofsd in the sandbox of a share's unit, and a guest's kernel that asks for what is not its."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from vmsilod.units.hardening import SHARE

if TYPE_CHECKING:
    from hosts.standin.site import Site

CLIENT = Path(__file__).parents[1] / "hosts" / "hostile_fuse.py"
UNIT = f"""
[Service]
Type=oneshot
TemporaryFileSystem=/:ro
BindReadOnlyPaths=/usr /lib -/lib64 -/etc/ld.so.cache /srv/hostile.py
BindPaths=/srv/hostile:/share
User=user
ExecStart=/usr/bin/python3 -IS /srv/hostile.py /usr/local/lib/vmsilo/daemon /usr/libexec/virtiofsd
{SHARE}
# The client is a part of it here, beside its virtiofsd.
PrivatePIDs=no
"""


def has_landlock(site: Site) -> bool:
    probe = "import ctypes; print(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1))"
    # By the host's own systemd: what comes from outside is not under systemd-nspawn's filter.
    argv = ["systemd-run", "--pipe", "--wait", "-q", "python3", "-c", probe]
    return int(site.host.run(argv).stdout) >= 2


def test_a_hostile_guest_gets_nothing_but_its_directory(site: Site) -> None:
    host = site.host
    if host.run("test -x /usr/libexec/virtiofsd", check=False).returncode:
        pytest.skip("this host has no virtiofsd")
    host.copy_in(CLIENT, "/srv/hostile.py")
    host.run(
        "mkdir -p /srv/hostile/inner; echo n > /srv/hostile/note; ln -s /etc /srv/hostile/link;"
        "chown -R user:user /srv/hostile; chmod 644 /srv/hostile.py"
    )
    host.write("/run/systemd/system/hostile.service", UNIT)
    try:
        host.run("systemctl daemon-reload; systemctl start hostile.service", check=False)
        said = host.run("journalctl --sync; journalctl -o cat -u hostile.service").stdout
        found_lines = [line for line in said.splitlines() if line.startswith("FOUND ")]
        assert len(found_lines) == 1, said
        found = json.loads(found_lines[0].removeprefix("FOUND "))
        assert found["use"] == {"create": 0, "rename": 0, "link": 0, "open": 0}
        refused = {-errno.EACCES, -errno.EROFS, -errno.EPERM, -errno.ENOENT, -errno.EXDEV}
        attack = found["attack"]
        assert attack.pop("through a link") == 0
        if not has_landlock(site):  # systemd-nspawn 252 does not let it through
            del attack["memory"], attack["program"]
        assert {name: error for name, error in attack.items() if error not in refused} == {}
        left = host.run("find /srv -newer /srv/hostile.py -type f -perm /6000; ls /srv /srv/hostile").stdout
        assert left.split() == [
            *("/srv:", "hostile", "hostile.py", "/srv/hostile:", "g", "h", "inner", "link", "note"),
        ]
    finally:
        host.run(
            "rm -rf /run/systemd/system/hostile.service /srv/hostile /srv/hostile.py;"
            "systemctl daemon-reload; systemctl reset-failed hostile.service",
            check=False,
        )
