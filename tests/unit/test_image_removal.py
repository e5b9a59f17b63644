"""Versions that nobody needs go, those that run stay, and a kill -9 at any step leaves nothing between."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from image_tree import FIRST, FOURTH, SECOND, THIRD, make_version
from vmsilo_image import integrity, store
from vmsilo_image.__main__ import main
from vmsilo_image.versions import list_versions, read_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.symlink", "os.mkdir", "shutil.rmtree", "fcntl.fcntl")


def killed_at(steps: int, action: Callable[[], object]) -> int:
    """Runs it in a child that is ended by SIGKILL before the operation that changes the file system for the
    n-th time; -9, or 0 when it came to its end before."""
    child = os.fork()
    if child == 0:
        left = steps

        def count(event: str, args: tuple[object, ...]) -> None:
            nonlocal left
            if event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & os.O_CREAT):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        status = 70
        try:
            status = 1 if action() == 1 else 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Store:
    """Real directories; `run` is the command line, in this process."""

    def __init__(self, top: Path) -> None:
        self.images, self.state, self.checked = top / "images", top / "state", top / "checked"
        self.state.mkdir()

    def words(self, *words: str) -> list[str]:
        places = ("images", "state", "checked")
        return [*(f"--{place}={getattr(self, place)}" for place in places), *words]

    def run(self, *words: str) -> int:
        return main(self.words(*words))

    def record(self, vm: str, image: str, version: str | None) -> None:
        """What vmsilod writes for a VM that runs."""
        content = {"name": vm, "config": json.dumps({"name": vm, "image": image})}
        if version is not None:
            content["version"] = version
        (self.state / f"{vm}.json").write_text(json.dumps(content))

    def names(self, image: str = "web") -> list[str]:
        return sorted(path.name for path in (self.images / image).glob("2*"))


@pytest.fixture
def place(tmp_path: Path) -> Store:
    if os.geteuid() != 0:
        pytest.skip("needs root: images are root's")
    found = Store(tmp_path)
    for version in (FIRST, SECOND, THIRD, FOURTH):
        make_version(found.images, "web", version)
    return found


@contextlib.contextmanager
def held_open(path: Path, *, mapped: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """Another process has the file, as a VMM has; `mapped`: only a mapping of it is left."""
    text = f"""
import mmap, sys
file = open({str(path)!r}, "rb")
if {mapped}:
    held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    file.close()
print(flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", text], stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_gc_keeps_current_previous_and_the_newest(place: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run("use", "web", FIRST) == 0  # previous: FOURTH
    capsys.readouterr()
    assert place.run("gc", "--keep", "2", "--dry-run") == 0
    assert capsys.readouterr().out.split()[:2] == ["web:", SECOND]
    assert place.names() == [FIRST, SECOND, THIRD, FOURTH]
    assert place.run("gc", "--keep", "1") == 0
    assert place.names() == [FIRST, FOURTH]
    assert sorted(path.name for path in place.images.iterdir()) == [".lock", "web"]


def test_gc_keeps_as_many_as_the_current_recipe_says(place: Store) -> None:
    make_version(place.images, "mail", FIRST)
    make_version(place.images, "mail", SECOND)
    make_version(place.images, "mail", THIRD)
    make_version(place.images, "mail", FOURTH, keep=3)
    assert place.run("gc") == 0
    assert place.names("mail") == [SECOND, THIRD, FOURTH]
    assert place.names() == [THIRD, FOURTH]


def test_what_a_record_names_stays(place: Store, capsys: pytest.CaptureFixture[str]) -> None:
    place.record("banking", "web", FIRST)
    assert place.run("gc", "--keep", "1") == 0
    assert place.names() == [FIRST, THIRD, FOURTH]
    assert place.run("rm", "web", FIRST) == 1
    assert capsys.readouterr().err == (
        f"vmsilo-image: VM banking runs from version {FIRST} of image web\nhint: vm-stop banking\n"
    )
    assert place.run("rm", "web", "--all") == 1
    assert place.names() == [FIRST, THIRD, FOURTH]
    (place.state / "banking.json").unlink()
    assert place.run("rm", "web", FIRST) == 0
    assert place.names() == [THIRD, FOURTH]


def test_a_record_without_a_version_protects_the_whole_image(place: Store) -> None:
    """Of an older vmsilod, or of a VM that is just being started."""
    place.record("banking", "web", None)
    assert place.run("gc", "--keep", "1") == 0
    assert place.names() == [FIRST, SECOND, THIRD, FOURTH]


def test_an_unreadable_record_stops_everything(place: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (place.state / "banking.json").write_text("{")
    assert place.run("gc", "--keep", "1") == 1
    assert "is not a record of a VM" in capsys.readouterr().err
    assert place.names() == [FIRST, SECOND, THIRD, FOURTH]


@pytest.mark.parametrize("mapped", ["", "mapped"])
def test_what_somebody_has_open_stays_without_any_record(
    place: Store, mapped: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with held_open(place.images / "web" / FIRST / "root.erofs", mapped=bool(mapped)) as holder:
        assert place.run("rm", "web", FIRST) == 1
        err = capsys.readouterr().err
        assert "root.erofs is in use" in err
        assert mapped or f"[{holder.pid}]" in err
        assert place.run("gc", "--keep", "1") == 1
        assert place.names() == [FIRST, THIRD, FOURTH]
    assert place.run("gc", "--keep", "1") == 0
    assert place.names() == [THIRD, FOURTH]


def test_current_is_not_removed_but_with_its_image(place: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run("rm", "web", "current") == 1
    assert f"{FOURTH} is the current version of image web" in capsys.readouterr().err
    assert place.run("rm", "web") == 1
    assert place.run("rm", "web", "previous", FIRST) == 0
    assert place.names() == [SECOND, FOURTH]
    assert not (place.images / "web/previous").is_symlink()
    assert place.run("rm", "web", "--all") == 0
    assert [path.name for path in place.images.iterdir()] == [".lock"]


def test_what_was_checked_is_forgotten_with_its_version(place: Store) -> None:
    path = place.images / "web" / FIRST
    integrity.check_version(path, None, place.checked)
    assert [each.name for each in place.checked.iterdir()] == [f"web.{FIRST}"]
    assert place.run("rm", "web", FIRST) == 0
    assert list(place.checked.iterdir()) == []


def whole(place: Store) -> list[str]:
    """The versions that there are; each of them complete, and the links lead to some of them."""
    versions = list_versions(place.images, "web")
    for each in versions:
        integrity.verify_version(each.path, place.checked)
    names = [each.version for each in versions]
    if (place.images / "web").is_dir():
        assert store.read_link(place.images / "web/current") in names
    return names


@pytest.mark.parametrize(
    "words",
    [
        ("rm", "web", SECOND, THIRD),
        ("rm", "web", "--all"),
        ("gc", "--keep", "1"),
        ("use", "web", "previous"),
        ("use", "web", FIRST),
    ],
    ids=" ".join,
)
def test_a_kill_at_any_step(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Every version is there as a whole or not at all, and gc takes what is left in between."""
    if os.geteuid() != 0:
        pytest.skip("needs root: images are root's")
    kills = 0
    while True:
        top = tmp_path / str(kills)
        top.mkdir()
        place = Store(top)
        for version in (FIRST, SECOND, THIRD, FOURTH):
            make_version(place.images, "web", version)
        status = killed_at(kills, functools.partial(place.run, *words))
        before = whole(place)
        assert place.run("gc", "--keep", "4") == 0
        assert whole(place) == before
        left = {path.name for path in place.images.iterdir()}
        assert left <= {".lock", "web"}, left
        inside = {path.name for path in (place.images / "web").glob("*")}
        assert inside <= {"current", "previous", *before}
        assert place.run(*words) in (0, 1)  # and the command can be given again
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
    assert kills >= 5


def test_a_build_that_is_published_is_killed_at_any_step(tmp_path: Path) -> None:
    """The old version is current, or the new one, and each is whole; the next build cleans up."""
    seen = set()
    for kills in range(100):
        images = tmp_path / str(kills)
        make_version(images, "web", FIRST)
        build = functools.partial(make_version, images, "web", SECOND, root=b"x" * 100000)
        status = killed_at(kills, build)
        current = images / "web" / "current"
        seen.add(str(current.readlink()))
        integrity.verify_version(current.resolve(), tmp_path / "checked")
        assert all(read_manifest(each.path) for each in list_versions(images))
        make_version(images, "web", THIRD)
        assert {path.name for path in images.iterdir()} == {".lock", "web"}
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert seen == {FIRST, SECOND}
    assert kills >= 5
