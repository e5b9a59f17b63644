"""A VM's ssh keys: made once, whole or not at all, private, gone with the VM."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest
from vmsilod.errors import Failed, NoSsh
from vmsilod.resources import ssh_keys

if TYPE_CHECKING:
    from pathlib import Path

needs_keygen = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir() if path.suffix != ".pub"}


@needs_keygen
def test_keys_are_made_once_and_are_different(tmp_path: Path) -> None:
    root = tmp_path / "ssh"
    first = ssh_keys.prepare_keys("banking", "anna", 1000, root)
    assert first is not None
    assert ssh_keys.prepare_keys("banking", "anna", 1000, root) == first
    assert set(first.authorized) == {"anna", "root"}
    assert first.host.startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    other = ssh_keys.prepare_keys("work", "anna", 1000, root)
    assert other is not None
    lines = {key for keys in (first, other) for key in keys.authorized.values()}
    assert len(lines) == 4
    assert all(line.startswith(b"ssh-ed25519 ") and line.count(b"\n") == 1 for line in lines)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert modes(root / "banking") == {0o600}
    assert sorted(path.name for path in root.iterdir()) == ["banking", "work"]


@needs_keygen
def test_what_a_killed_start_left_is_replaced(tmp_path: Path) -> None:
    for half in (tmp_path / "banking", tmp_path / ".banking.new"):
        half.mkdir()
        (half / "user").write_text("half")
    keys = ssh_keys.prepare_keys("banking", "user", 1000, tmp_path)
    assert keys is not None
    assert ssh_keys.is_whole(tmp_path / "banking")
    assert [path.name for path in tmp_path.iterdir()] == ["banking"]


def test_without_ssh_keygen_there_are_no_keys_and_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_keys, "KEYGEN_PATH", str(tmp_path))
    assert ssh_keys.prepare_keys("banking", "user", 1000, tmp_path / "ssh") is None
    with pytest.raises(NoSsh) as caught:
        ssh_keys.open_door("banking", "user", 1000, tmp_path / "ssh")
    assert "openssh-client" in caught.value.hint


def test_an_ssh_keygen_that_fails_leaves_nothing_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "ssh-keygen"
    program.write_text("#!/bin/sh\necho no entropy >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(ssh_keys, "KEYGEN_PATH", str(tmp_path))
    with pytest.raises(Failed, match="no entropy"):
        ssh_keys.make_keys("banking", 1000, tmp_path / "ssh")
    assert not (tmp_path / "ssh" / "banking").exists()


@needs_keygen
def test_a_door_has_the_logins_own_key_sealed(tmp_path: Path) -> None:
    ssh_keys.prepare_keys("banking", "user", 1000, tmp_path)
    owner = 65534 if os.getuid() == 0 else os.getuid()
    for key in ("user", "root"):
        door = ssh_keys.open_door("banking", key, owner, tmp_path)
        try:
            assert os.pread(door.key_fd, 1 << 16, 0) == (tmp_path / "banking" / key).read_bytes()
            found = os.fstat(door.key_fd)
            assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (owner, 0o400)
            assert fcntl.fcntl(door.key_fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
            assert not os.get_inheritable(door.key_fd)
        finally:
            os.close(door.key_fd)
        derived = subprocess.run(
            ["ssh-keygen", "-y", "-f", str(tmp_path / "banking" / "host")],
            capture_output=True,
            text=True,
            check=True,
        )
        assert derived.stdout.split()[:2] == door.host_key.split()


@needs_keygen
def test_keys_go_with_their_vm(tmp_path: Path) -> None:
    for name in ("banking", "work"):
        ssh_keys.prepare_keys(name, "user", 1000, tmp_path)
    (tmp_path / ".gone.new").mkdir()
    (tmp_path / ".work.new").mkdir()
    ssh_keys.keep_only(frozenset({"work"}), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".work.new", "work"]
    ssh_keys.keep_only(frozenset(), tmp_path / "none")


@needs_keygen
def test_a_new_owner_gets_new_keys(tmp_path: Path) -> None:
    """The old one may have kept those that he was given."""
    first = ssh_keys.prepare_keys("banking", "user", 1000, tmp_path)
    assert ssh_keys.prepare_keys("banking", "user", 1000, tmp_path) == first
    other = ssh_keys.prepare_keys("banking", "user", 1001, tmp_path)
    assert first is not None
    assert other is not None
    assert first.authorized["root"] != other.authorized["root"]
    assert first.host != other.host
