"""guest/image/init under busybox, as far as it runs outside of a guest."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

INIT = Path(__file__).parents[2] / "guest" / "image" / "init"
PASSWD = "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000:VM user:/home/user:/bin/bash\nuserx:x:7:7::/x:\n"
GROUP = "root:x:0:\nuser:x:1000:\nusers:x:100:user\n"

needs_busybox = pytest.mark.skipif(shutil.which("busybox") is None, reason="busybox")


def renumber(new: Path, ids: str) -> int:
    (new / "etc/vmsilo").mkdir(parents=True)
    (new / "home/user/folder").mkdir(parents=True)
    (new / "home/user/link").symlink_to("/etc/passwd")
    (new / "etc/vmsilo/agent.json").write_text('{"user": "user"}\n')
    (new / "etc/passwd").write_text(PASSWD)
    (new / "etc/group").write_text(GROUP)
    found = re.search(r"^renumber_user\(\) \{$.*?^\}$", INIT.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    script = f"new=$1\n{found[0]}\nrenumber_user $2"
    return subprocess.run(["busybox", "sh", "-c", script, "sh", str(new), ids], check=False).returncode


@needs_busybox
@pytest.mark.skipif(os.geteuid() != 0, reason="chown")
def test_the_user_gets_the_ids_that_the_host_says(tmp_path: Path) -> None:
    assert renumber(tmp_path, "1234:1235") == 0
    assert (tmp_path / "etc/passwd").read_text() == PASSWD.replace("1000:1000", "1234:1235")
    assert (tmp_path / "etc/group").read_text() == GROUP.replace("user:x:1000", "user:x:1235")
    for path in (tmp_path / "home/user", *(tmp_path / "home/user").iterdir()):
        assert (path.lstat().st_uid, path.lstat().st_gid) == (1234, 1235)
    assert (tmp_path / "etc/passwd").stat().st_uid == 0


@needs_busybox
def test_nothing_is_touched_where_the_image_has_them(tmp_path: Path) -> None:
    assert renumber(tmp_path, "1000:1000") == 0
    assert sorted(path.name for path in (tmp_path / "etc").iterdir()) == ["group", "passwd", "vmsilo"]
    assert (tmp_path / "etc/passwd").read_text() == PASSWD


@needs_busybox
@pytest.mark.skipif(os.geteuid() != 0, reason="chown")
def test_a_group_that_has_the_number_already_keeps_it(tmp_path: Path) -> None:
    assert renumber(tmp_path, "1234:100") == 0
    assert "user:x:1234:100:" in (tmp_path / "etc/passwd").read_text()
    assert (tmp_path / "etc/group").read_text() == GROUP
