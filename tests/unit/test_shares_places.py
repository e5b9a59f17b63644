"""Which directory of the host is opened for a share, whose the places of the homes become, and where no home
is accepted.
"""

from __future__ import annotations

import os
import pwd
from typing import TYPE_CHECKING

import pytest
from vmsilod.errors import StartFailed
from vmsilod.resources import shares
from vmsilod.resources.shares import Share, hand_over_places, has_home, is_same, open_directory

if TYPE_CHECKING:
    from pathlib import Path

MINE = os.getuid()
NOBODY = pwd.getpwnam("nobody").pw_uid
OTHER = 4321
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="links of root need root")


def test_a_directory_is_opened_by_a_safe_way_only(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    fd = open_directory(inner, {MINE})
    other = open_directory(tmp_path / "a", {MINE})
    try:
        assert os.fstat(fd).st_ino == inner.stat().st_ino
        assert is_same(fd, fd)
        assert not is_same(fd, other)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fchmod(fd, 0o700)
    finally:
        os.close(fd)
        os.close(other)
    (tmp_path / "file").write_text("")
    with pytest.raises(StartFailed, match="is not a directory"):
        open_directory(tmp_path / "file", {MINE})
    with pytest.raises(StartFailed, match="does not exist"):
        open_directory(tmp_path / "a" / "none", {MINE})


@needs_root
def test_links_of_users_are_not_followed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "real").mkdir()
    (tmp_path / "by-root").symlink_to("real")
    (tmp_path / "by-user").symlink_to("real")
    os.chown(tmp_path / "by-user", 4321, 4321, follow_symlinks=False)
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "link").symlink_to("../real")  # root's, but where a user can exchange it
    os.chown(tmp_path / "users", 4321, 4321)
    os.close(open_directory(tmp_path / "by-root", {4321}))
    for path in ("by-user", "users/link"):
        with pytest.raises(StartFailed, match="is a symbolic link"):
            open_directory(tmp_path / path, {4321})
    with pytest.raises(StartFailed, match="belongs to uid 4321"):
        open_directory(tmp_path / "users", {1000})


@needs_root
@pytest.mark.parametrize("mode", [0o775, 0o757, 0o2775])
def test_nobody_else_may_exchange_what_is_on_the_way(tmp_path: Path, mode: int) -> None:
    inner = tmp_path / "open" / "inner"
    inner.mkdir(parents=True)
    inner.chmod(0o777)
    os.close(open_directory(inner, {MINE}))
    os.chown(tmp_path / "open", -1, OTHER)
    (tmp_path / "open").chmod(mode)
    with pytest.raises(StartFailed, match=rf"{tmp_path}/open on the way .* has mode {mode:04o}") as caught:
        open_directory(inner, {MINE})
    assert caught.value.hint == f"chmod go-w {tmp_path}/open"
    os.close(open_directory(tmp_path / "open", {MINE}))
    (tmp_path / "open").chmod(mode | 0o1000)
    os.close(open_directory(inner, {MINE}))


@needs_root
def test_a_group_of_the_owner_alone_is_not_others(tmp_path: Path) -> None:
    inner = tmp_path / "open" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "open").chmod(0o775)  # root:root, and nobody else is in that group
    os.close(open_directory(inner, {MINE}))
    user = next((each for each in pwd.getpwall() if each.pw_uid and each.pw_name != "root"), None)
    assert user is not None
    os.chown(tmp_path / "open", 0, user.pw_gid)
    with pytest.raises(StartFailed, match="has mode 0775"):
        open_directory(inner, {MINE})


@needs_root
def test_a_sticky_directory_keeps_only_what_is_ones_own(tmp_path: Path) -> None:
    inner = tmp_path / "tmp" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "tmp").chmod(0o1777)
    os.chown(inner, OTHER, OTHER)
    os.close(open_directory(inner, {OTHER}))
    with pytest.raises(StartFailed, match="belongs to uid 4321"):
        open_directory(inner, {1000})


@needs_root
def test_places_are_handed_over_while_they_are_as_they_were_made(tmp_path: Path) -> None:
    names = {"homes": 0o700, "template": 0o755, "samba": 0o755, "full": 0o700, "others": 0o700}
    for name, mode in names.items():
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    (tmp_path / "full" / "department").mkdir()
    os.chown(tmp_path / "others", OTHER, OTHER)
    (tmp_path / "aim").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("aim")
    expected = dict.fromkeys((*names, "link", "none"), 0o700) | {"template": 0o755}
    hand_over_places("nobody", {tmp_path / name: mode for name, mode in expected.items()})
    assert {name: (tmp_path / name).lstat().st_uid for name in (*names, "aim", "link")} == {
        "homes": NOBODY, "template": NOBODY, "samba": 0, "full": 0, "others": OTHER, "aim": 0, "link": 0,
    }  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Share:
    """Not made yet, where all is as it should be."""
    homes, template = tmp_path / "shared", tmp_path / "template"
    homes.mkdir(mode=0o700)
    template.mkdir()
    monkeypatch.setattr(shares, "HOMES", homes)
    monkeypatch.setattr(shares, "TEMPLATE", template)
    if MINE == 0:
        os.chown(homes, NOBODY, NOBODY)
    return a_home(homes / "a")


def a_home(path: Path) -> Share:
    uid = NOBODY if MINE == 0 else MINE
    return Share(
        "vmsilo-home", path, "/home/user", readonly=False, cache="auto", uid=uid, gid=uid, guest_id=1000
    )


def make(home: Share) -> None:
    home.path.mkdir()
    os.chown(home.path, home.uid, home.gid)


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701])
def test_no_home_where_others_come_near(home: Share, mode: int) -> None:
    assert not has_home(home)
    make(home)
    assert has_home(home)
    home.path.parent.chmod(mode)
    with pytest.raises(StartFailed, match=rf"is owned by \w+ and has mode {mode:04o}") as caught:
        has_home(home)
    assert 'shared_home = "/path"' in caught.value.hint


@needs_root
def test_no_home_in_what_is_another_users(home: Share) -> None:
    os.chown(home.path.parent, OTHER, OTHER)
    with pytest.raises(StartFailed, match="is owned by uid 4321 and has mode 0700"):
        has_home(home)
    os.chown(home.path.parent, 0, 0)
    with pytest.raises(StartFailed, match="is owned by root and has mode 0700"):
        has_home(home)  # only the user could make it
    make(home)
    assert has_home(home)


@needs_root
def test_a_home_is_no_copy_of_another_users_template(home: Share) -> None:
    os.chown(shares.TEMPLATE, OTHER, OTHER)
    with pytest.raises(StartFailed, match="a copy of, is owned by uid 4321"):
        has_home(home)
    make(home)
    assert has_home(home)


def test_a_home_elsewhere_does_not_mind(home: Share, tmp_path: Path) -> None:
    home.path.parent.chmod(0o755)
    elsewhere = a_home(tmp_path / "b")
    assert not has_home(elsewhere)
    home.path.parent.rmdir()
    assert not has_home(elsewhere)
    with pytest.raises(StartFailed, match="No such file"):
        has_home(home)
