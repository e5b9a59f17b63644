"""Which working directory may become one of a disposable."""

from __future__ import annotations

import os
import pwd
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError
from vmsilod.bus.requests import Shared
from vmsilod.config import VmConfig
from vmsilod.config.schema import VmFile
from vmsilod.disposables.places import Here, accept_directory
from vmsilod.errors import StartFailed, VmsiloError
from vmsilod.resources.shares import GuestUser, plan_shares
from vmsilod.shares import check_directory, compare_directory

if TYPE_CHECKING:
    from pathlib import Path

ME = os.geteuid()
MY_NAME = pwd.getpwuid(ME).pw_name


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of this process's user, with a project in it."""
    home = tmp_path / "home"
    (home / "project").mkdir(parents=True)
    entry = pwd.struct_passwd(("me", "x", ME, ME, "", str(home), "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: entry)
    return home


def accept(path: Path | str, *, opened: Path | None = None, home: bool = False, ro: bool = False) -> Here:
    fd = os.open(opened or path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return accept_directory(Shared(fd, str(path), readonly=ro, home=home), ME)
    finally:
        os.close(fd)


def test_a_project_is_shared_at_its_own_path(place: Path) -> None:
    share = accept(place / "project", ro=True).share
    assert (share.path, share.mount, share.tag, share.readonly) == (
        *(str(place / "project"), str(place / "project"), "here"),
        True,
    )


def test_all_of_the_home_only_if_asked_and_what_holds_it_never(place: Path) -> None:
    with pytest.raises(VmsiloError, match="all of your home"):
        accept(place)
    accept(place, home=True)
    with pytest.raises(VmsiloError, match="holds your home"):
        accept(place.parent, home=True)


def test_a_home_behind_a_link_is_a_home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = place / "data" / "me"
    (real / "project").mkdir(parents=True)
    link = place / "link"
    link.symlink_to("data")
    entry = pwd.struct_passwd(("me", "x", ME, ME, "", str(link / "me"), "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: entry)
    with pytest.raises(VmsiloError, match="all of your home"):
        accept(real)
    accept(real, home=True)
    with pytest.raises(VmsiloError, match="holds your home"):
        accept(real.parent, home=True)
    accept(real / "project")


def test_the_start_shares_what_was_opened_and_nothing_else_at_its_path(place: Path) -> None:
    project, other = place / "project", place / "other"
    other.mkdir()
    here = accept(project)
    config = VmConfig.model_validate(
        {
            **{"name": "box", "user": MY_NAME, "memory": 512, "cpus": 1, "color": "red"},
            **{"image": "default", "start_timeout": 9, "stop_timeout": 9},
            **{"shared_directories": [here.share], "shared_inode": here.inode},
        }
    )
    (share,) = plan_shares(VmConfig.from_json(config.to_json()), GuestUser("user", ME))
    check_directory(MY_NAME, share)
    project.rename(place / "aside")
    other.rename(project)
    with pytest.raises(StartFailed, match="not the directory any more"):
        check_directory(MY_NAME, share)
    seen = os.open(project, os.O_PATH)  # the unit, too, has what the path leads to
    try:
        with pytest.raises(StartFailed, match="not the directory any more"):
            compare_directory(MY_NAME, share, seen)
    finally:
        os.close(seen)


def test_no_file_says_which_inode() -> None:
    with pytest.raises(ValidationError, match="shared_inode"):
        VmFile.model_validate({"name": "a", "shared_inode": (1, 2)})


@pytest.mark.parametrize("path", ["/", "/etc", "/proc", "/usr", "/usr/share", "/run", "/dev", "/sys"])
def test_what_host_or_guest_need_is_refused(place: Path, path: str) -> None:
    with pytest.raises(VmsiloError, match="cannot be"):
        accept(path, opened=place)


@pytest.mark.skipif(ME != 0, reason="chown")
def test_what_belongs_to_somebody_else_is_refused(place: Path) -> None:
    os.chown(place / "project", 12345, 12345)
    with pytest.raises(VmsiloError, match="belongs to uid 12345"):
        accept(place / "project")


def test_the_path_must_be_that_of_what_was_opened(place: Path) -> None:
    (place / "other").mkdir()
    with pytest.raises(VmsiloError, match="not the directory that was opened"):
        accept(place / "project", opened=place / "other")
    with pytest.raises(VmsiloError, match="plain path"):
        accept(f"{place}/./project/")
    (place / "file").touch()
    with pytest.raises(VmsiloError, match="no directory"):
        accept(place / "file")
