"""Versions appear whole, and what a killed builder left is removed by the next one."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from vmsilo_image import store, versions
from vmsilo_image.__main__ import main
from vmsilo_image.errors import ImageError
from vmsilo_image.progress import BootstrapOutput, Progress

FIRST, SECOND = "20260101T000000Z-00000001", "20260102T000000Z-00000002"
HOLDER = """
import sys, time
sys.path.insert(0, {daemon!r})
from pathlib import Path
from vmsilo_image import store, versions
with store.private_build(Path({images!r})) as work:
    (work / "root").mkdir()
    (work / "root/file").write_text("x")
    print(work.name, flush=True)
    time.sleep(60)
"""


def make_version(images: Path, work: Path, name: str, version: str) -> Path:
    ready = work / f"out-{version}"
    ready.mkdir(parents=True)
    (ready / "root.erofs").write_bytes(b"x" * 2048)
    (ready / "manifest.json").write_text(json.dumps({"built": "2026-01-01T00:00:00+00:00"}))
    return store.publish(images, name, ready, version)


def test_publish_switches_current(tmp_path: Path) -> None:
    images = tmp_path / "images"
    with store.private_build(images) as work:
        make_version(images, work, "web", FIRST)
    with store.private_build(images) as work:
        second = make_version(images, work, "web", SECOND)
    assert versions.find_current(images, "web") == second
    assert str((images / "web/current").readlink()) == SECOND
    listed = versions.list_versions(images)
    assert [(v.version, v.current) for v in listed] == [(SECOND, True), (FIRST, False)]
    assert sorted(path.name for path in images.iterdir()) == [".lock", "web"]


def test_current_is_never_missing_during_a_switch(tmp_path: Path) -> None:
    """Every look from another process, while versions change, finds a link to one of them."""
    folder = tmp_path / "web"
    folder.mkdir()
    store.switch_current(folder, FIRST)
    child = os.fork()
    if child == 0:
        for _ in range(300):
            store.switch_current(folder, SECOND)
            store.switch_current(folder, FIRST)
        os._exit(0)
    looks = 0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        assert str((folder / "current").readlink()) in (FIRST, SECOND)
        looks += 1
    assert looks > 0


def test_left_over_of_an_interrupted_switch_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / ".current").symlink_to("nowhere")
    store.switch_current(tmp_path, FIRST)
    assert [path.name for path in tmp_path.iterdir()] == ["current"]


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build() -> None:
        with store.private_build(tmp_path) as work:
            (work / "root").mkdir()
            raise ImageError("broken")

    with pytest.raises(ImageError, match="broken"):
        build()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_stale_build_is_removed_a_living_one_is_not(tmp_path: Path) -> None:
    daemon = str(Path(store.__file__).parents[1])
    text = HOLDER.format(daemon=daemon, images=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        name = holder.stdout.readline().strip()
        assert store.remove_leftovers(tmp_path) == []
        assert (tmp_path / name / "root/file").exists()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert store.remove_leftovers(tmp_path) == [name]
    assert not (tmp_path / name).exists()


def test_build_directory_without_lock_is_stale(tmp_path: Path) -> None:
    (tmp_path / ".build-x").mkdir()
    assert store.remove_leftovers(tmp_path) == [".build-x"]


def test_mounts_below_are_found_innermost_first() -> None:
    mountinfo = (
        "1 0 8:1 / / rw - ext4 /dev/a rw\n"
        "2 1 0:3 / /i/.build-a/root/proc rw - proc proc rw\n"
        "3 2 0:3 / /i/.build-a/root/proc/x\\040y rw - tmpfs t rw\n"
        "4 1 0:3 / /i/.build-ab/root rw - tmpfs t rw\n"
    )
    assert store.find_mounts(mountinfo, "/i/.build-a") == [
        "/i/.build-a/root/proc/x y",
        "/i/.build-a/root/proc",
    ]


def test_missing_image_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no image mail") as caught:
        versions.find_current(tmp_path, "mail")
    assert caught.value.hint == "Build it: vmsilo image build mail"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(words)
    out, err = capsys.readouterr()
    return status, out, err


def test_list_and_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_version(tmp_path, tmp_path / ".work", "web", FIRST)
    assert run(capsys, "path", "web", "--images", str(tmp_path)) == (0, f"{path}\n", "")
    status, out, _ = run(capsys, "--images", str(tmp_path), "list", "--json")
    rows = json.loads(out)
    assert status == 0
    assert [(row["name"], row["version"], row["current"]) for row in rows] == [("web", FIRST, True)]
    _, out, _ = run(capsys, "list", "--images", str(tmp_path))
    assert out.split()[:2] == ["web", FIRST]
    assert out.rstrip().endswith("current")


def test_list_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "list", "--images", str(tmp_path / "none")) == (0, "", "")


def test_errors_are_a_fact_and_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "path", "mail", "--images", str(tmp_path))
    assert (status, out) == (1, "")
    assert err == (
        f"vmsilo-image: there is no image mail in {tmp_path}\nhint: Build it: vmsilo image build mail\n"
    )


@pytest.mark.parametrize("words", [(), ("build",), ("burn",), ("path", "a", "b"), ("list", "--jason")])
def test_wrong_command_lines(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: vmsilo-image")


def test_bad_recipe_is_told_before_anything_is_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("colour = 1\n")
    images = tmp_path / "images"
    status, _, err = run(capsys, "build", "web", "--recipe", str(recipe), "--images", str(images))
    assert status == 1
    assert f"{recipe}: colour: unknown key" in err
    assert not images.exists()


def test_progress_on_a_pipe_is_a_line_per_phase_and_never_goes_back() -> None:
    stream = io.StringIO()
    progress = Progress(stream, "x")
    watcher = BootstrapOutput(progress)
    totals = []
    for line in (
        "I: running apt-get update...",
        "I: downloading packages with apt...",
        "0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.",
        "Get:1 a",
        "Get:2 b",
        "I: extracting archives...",
        "I: installing essential packages...",
        "Unpacking a",
        "Setting up a",
        "I: installing remaining packages inside the chroot...",
        "\x1b[31mGet:1 evil",
    ):
        watcher.feed(line)
        totals.append(progress.total())
    assert totals == sorted(totals)
    assert totals[-1] > 0.4
    assert stream.getvalue().splitlines() == [
        "x: fetching package lists",
        "x: downloading packages",
        "x: installing the essential packages",
        "x: installing packages",
    ]
