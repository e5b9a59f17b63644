"""Shared directories: what the files may say, what becomes of it, how a home is made."""

from __future__ import annotations

import ctypes
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from vmsilo_image.cpio import STORAGE_FILE
from vmsilo_share.home import HomeError, make_home
from vmsilod.config import VmConfig
from vmsilod.config.schema import GlobalConfig, VmFile
from vmsilod.control import UNIT_PATTERN
from vmsilod.errors import StartFailed
from vmsilod.resources.shares import (
    GuestUser,
    mount_unit,
    plan_arguments,
    plan_mounts,
    plan_shares,
)
from vmsilod.units.files import OUR_FILE
from vmsilod.units.shares import share_unit

ME = pwd.getpwuid(os.getuid()).pw_name
GUEST = GuestUser("anna", 1001)
MINE = os.getuid()


def make_vm(**changes: object) -> VmConfig:
    values: dict[str, object] = {
        "name": "banking",
        "user": "nobody",
        "memory": 1024,
        "cpus": 2,
        "color": "red",
        "image": "default",
        "start_timeout": 180,
        "stop_timeout": 30,
    }
    return VmConfig.model_validate(values | changes)


def refusal(**keys: object) -> str:
    with pytest.raises(ValidationError) as caught:
        VmFile.model_validate({"name": "a", "shared_directories": [keys]})
    return str(caught.value.errors()[0]["msg"])


@pytest.mark.parametrize(
    "path", ["/", "/etc", "/etc/ssh", "/var/lib", "/proc/1", "/run/user/1000", "/srv/../etc"]
)
def test_places_of_the_host_are_refused(path: str) -> None:
    assert path in refusal(path=path, tag="x")
    with pytest.raises(ValidationError):
        VmFile.model_validate({"name": "a", "shared_home": path})


@pytest.mark.parametrize(
    "path", ["/srv/data", "/run/media/david/stick", "/home/david/My Files", "/nix/store"]
)
def test_other_places_are_taken(path: str) -> None:
    VmFile.model_validate({"name": "a", "shared_directories": [{"path": path, "tag": "x"}]})


@pytest.mark.parametrize("mount", ["/", "/usr/share", "/etc", "/run/x", "relative"])
def test_places_of_the_guest_are_refused(mount: str) -> None:
    assert mount in refusal(path="/srv", mount=mount)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"path": "/srv"}, "needs a tag or a mount"),
        ({"path": "/srv", "tag": "a", "id": "a"}, "are the same"),
        ({"path": "/srv", "tag": "vmsilo-home"}, "vmsilo's own"),
        ({"path": "/srv", "tag": "a b"}, "not a tag"),
        ({"path": "/srv", "tag": "a", "proto": "9p"}, 'virtiofs" does the same'),
        ({"path": "/srv", "tag": "a", "cache": "often"}, "'auto', 'always' or 'never'"),
        ({"path": "/srv", "tag": "a", "uid_map": "0 0"}, "GUEST HOST COUNT"),
        ({"path": "/srv", "tag": "a", "uid_map": "0 0 10,5 100 1"}, "two ranges have 5 of the guest"),
        ({"path": "/srv", "tag": "a", "uid_map": "0 0 10,50 9 1"}, "two ranges have 9 of the host"),
        ({"path": "/srv", "tag": "a", "uid_map": "0 0 4294967296"}, "not a range"),
        ({"path": "/srv", "tag": "a", "uid": 5, "uid_map": "0 0 10"}, "leave uid out"),
        ({"path": "/srv", "tag": "a", "gid_map": "0 0 10"}, "needs a uid_map of several"),
    ],
)
def test_mistakes_are_told(keys: dict[str, object], told: str) -> None:
    assert told in refusal(**keys)


def test_the_same_tag_or_mount_twice() -> None:
    for second in ({"tag": "a", "mount": "/b"}, {"tag": "b", "mount": "/mnt/a"}):
        with pytest.raises(ValidationError, match="more than one share has the"):
            VmFile.model_validate(
                {
                    "name": "a",
                    "shared_directories": [{"path": "/srv", "tag": "a"}, {"path": "/opt", **second}],
                }
            )


def test_one_home_for_all_is_refused() -> None:
    assert GlobalConfig(user="david").shared_home is True
    with pytest.raises(ValidationError, match="no separation"):
        GlobalConfig.model_validate({"user": "david", "shared_home": "/srv/home"})


def test_a_configuration_comes_back_from_a_record() -> None:
    share = {"path": "/srv", "id": "home", "uidmap": "1000 1000 1", "gidmap": "1000 1000 1"}
    vm = make_vm(shared_home="/srv/h", shared_directories=[share, {"path": "/opt", "mount": "/data/x y"}])
    assert VmConfig.from_json(vm.to_json()) == vm
    assert [entry.tag for entry in vm.shared_directories] == ["home", "data-x_y"]


def rules(vm: VmConfig, tag: str, kind: str = "uid") -> list[str]:
    (share,) = [share for share in plan_shares(vm, GUEST) if share.tag == tag]
    argv = plan_arguments(share, "/v")
    return [argv[i + 1] for i, word in enumerate(argv) if word == f"--translate-{kind}"]


def test_without_maps_everything_is_the_users() -> None:
    vm = make_vm(shared_home=True)
    (share,) = plan_shares(vm, GUEST)
    assert (str(share.path), share.mount) == ("/shared/banking", "/home/anna")
    assert rules(vm, "vmsilo-home") == [
        "squash-guest:0:65534:4294967295",
        "host:65534:1001:1",
        "host:0:0:1",
        "squash-host:1:65534:65533",
        "squash-host:65535:65534:4294901760",
    ]


def test_maps_cover_every_number_once() -> None:
    vm = make_vm(shared_directories=[{"path": "/srv", "tag": "a", "uid_map": "0 100 10,1000 5 1"}])
    assert rules(vm, "a") == [
        "map:0:100:10",
        "map:1000:5:1",
        "forbid-guest:10:990",
        "forbid-guest:1001:4294966294",
        "squash-host:0:65534:5",
        "squash-host:6:65534:94",
        "squash-host:110:65534:4294967185",
    ]
    assert rules(vm, "a", "gid") == []


def test_only_what_belongs_to_several_users_is_served_by_root() -> None:
    vm = make_vm(
        shared_directories=[
            {"path": "/srv", "tag": "one", "uid_map": "1000 4321 1"},
            {"path": "/srv", "tag": "many", "uid_map": "0 0 65535"},
            {"path": "/srv", "tag": "ro", "readonly": True, "cache": "never"},
        ]
    )
    one, many, ro = plan_shares(vm, GUEST)
    assert (one.uid, many.uid, ro.uid) == (4321, 0, 65534)
    assert "--modcaps=-mknod:-setfcap" in plan_arguments(many, "/v")
    assert not [word for word in plan_arguments(one, "/v") if "modcaps" in word]
    assert {"--readonly", "never"} <= set(plan_arguments(ro, "/v"))


def test_nothing_is_mounted_over_the_home() -> None:
    vm = make_vm(shared_home=True, shared_directories=[{"path": "/srv", "mount": "/home/anna"}])
    with pytest.raises(StartFailed, match="mounted over its shared home"):
        plan_shares(vm, GUEST)


def test_mount_units() -> None:
    vm = make_vm(
        shared_home=True,
        shared_directories=[{"path": "/srv", "mount": "/data/my-files 100%", "tag": "a", "readonly": True}],
    )
    files = plan_mounts(plan_shares(vm, GUEST))
    assert sorted(files) == [
        "system/data-my\\x2dfiles\\x20100\\x25.mount",
        "system/home-anna.mount",
        "system/local-fs.target.d/10-vmsilo-shares.conf",
    ]
    assert "Where=/data/my-files 100%%\n" in files["system/data-my\\x2dfiles\\x20100\\x25.mount"]
    assert "Options=nosuid,nodev,ro\n" in files["system/data-my\\x2dfiles\\x20100\\x25.mount"]
    assert all(STORAGE_FILE.fullmatch(name) for name in files)
    assert plan_mounts([]) == {}
    assert mount_unit("/.x/ä") == "\\x2ex-\\xc3\\xa4.mount"


def test_units_have_names_of_their_own() -> None:
    unit = share_unit("vmsilo-a-share-vm.service", "vm")
    assert unit == "vmsilo-a-share-share@vm.service"
    for name, kind in (
        (unit, "share"),
        (share_unit("vmsilo-a-share-debug.service", "x.y-z"), "debugshare"),
        ("vmsilo-a-vm.service", "vm"),
    ):
        match = UNIT_PATTERN.fullmatch(name)
        assert match is not None
        assert match[2] == kind
        assert OUR_FILE.fullmatch(name)
    for name in ("vmsilo-a-vm@x.service", "vmsilo-a-share.service", "vmsilo-a-forward@x.service"):
        assert not UNIT_PATTERN.fullmatch(name)


def test_a_home_is_a_copy_without_what_is_dangerous(tmp_path: Path) -> None:
    template = tmp_path / "template"
    (template / "dir").mkdir(parents=True)
    (template / "dir" / "file").write_text("text")
    (template / "dir" / "file").chmod(0o6755)
    (template / "dir").chmod(0o750)
    (template / "link").symlink_to("/etc/passwd")
    os.mkfifo(template / "pipe")
    os.utime(template / "dir" / "file", (1, 2))
    home = tmp_path / "home"
    make_home(str(home), str(template))
    assert sorted(path.name for path in home.rglob("*")) == ["dir", "file", "link"]
    assert (home / "link").readlink() == Path("/etc/passwd")
    copied = (home / "dir" / "file").stat()
    assert (stat.S_IMODE(copied.st_mode), copied.st_mtime) == (0o755, 2)
    assert stat.S_IMODE((home / "dir").stat().st_mode) == 0o750
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    (home / "mine").write_text("kept")
    make_home(str(home), str(template))
    assert (home / "mine").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "template"]


def test_without_a_template_a_home_is_empty(tmp_path: Path) -> None:
    make_home(str(tmp_path / "home"), str(tmp_path / "none"))
    assert list((tmp_path / "home").iterdir()) == []


def test_an_interrupted_copy_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = tmp_path / "template"
    template.mkdir()
    (template / "a").write_text("whole")
    stale = tmp_path / ".home.vmsilo-new"
    (stale / "deep").mkdir(parents=True)
    (stale / "a").write_text("ha")
    (stale / "deep").chmod(0o000)

    def full(fd: int, data: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(HomeError, match="No space left"):
            make_home(str(tmp_path / "home"), str(template))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["template"]
    make_home(str(tmp_path / "home"), str(template))
    assert (tmp_path / "home" / "a").read_text() == "whole"


def test_a_way_to_a_home_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "shared").symlink_to("elsewhere")
    with pytest.raises(HomeError, match=r"Not a directory|Too many levels"):
        make_home(str(tmp_path / "shared" / "home"), str(tmp_path / "none"))


CONFINED = """
import errno, os, sys
sys.path.insert(0, sys.argv[1])
from vmsilo_share.confine import confine
inside, outside = sys.argv[2:]
confine("/bin/true", inside)
os.mkdir(f"{inside}/a")
os.rename(f"{inside}/file", f"{inside}/a/file")
open(f"{inside}/a/file", "w").close()
refused = 0
for call in (
    lambda: os.mkdir(f"{inside}/../evil"),
    lambda: os.unlink(f"{inside}/../outside"),
    lambda: os.rename(f"{inside}/a/file", outside),
    lambda: os.symlink("x", f"{inside}/../link"),
    lambda: open(outside).close(),
    lambda: open("/proc/self/mem", "r+b").close(),
):
    try:
        call()
    except PermissionError:
        refused += 1
print(refused)
"""


def test_what_is_confined_writes_below_its_directory_alone(tmp_path: Path) -> None:
    if ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) < 2:
        pytest.skip("this kernel has no Landlock (ABI 2)")
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    (inside / "file").write_text("")
    outside.write_text("")
    script = f"import ctypes; ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)\n{CONFINED}"
    daemon = str(Path(__file__).parents[2] / "daemon")
    done = subprocess.run(
        [sys.executable, "-c", script, daemon, str(inside), str(outside)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("6\n", "")
