"""Builds on a full disk, two at once, and in a directory that others can write: the builder as it is, with a
bootstrap tool of the test's own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from image_tree import FIRST, SECOND, make_version
from vmsilo_image import build, store
from vmsilo_image.errors import ImageError
from vmsilo_image.progress import Progress
from vmsilo_image.recipe import Recipe
from vmsilo_image.rootfs import GuestFiles

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: programs of a build get namespaces")

# Runs a build in a tmpfs of 16 MiB that only it sees, and prints what it raised and what is left.
BUILD = """
import io, subprocess, sys
from pathlib import Path
sys.path[:0] = {path!r}
from vmsilo_image import build, tools
from vmsilo_image.errors import ImageError
from vmsilo_image.progress import Progress
from vmsilo_image.recipe import Recipe
from vmsilo_image.rootfs import GuestFiles
from image_tree import FIRST, make_version
images = Path({images!r})
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16M,mode=755", "full", images], check=True)
make_version(images, "web", FIRST)
tools.PATH = {tools!r} + ":" + tools.PATH
order = build.Order("web", Recipe(), images, GuestFiles(images, ()), images.parent / "checked")
try:
    build.build_image(order, Progress(io.StringIO(), "x"))
except ImageError as error:
    print(error.fact)
    print(error.hint)
print(sorted(str(path.relative_to(images)) for path in images.rglob("*")))
"""
HEAD = '#!/bin/sh\nfor root; do :; done\nmkdir -p "$root/boot" "$root/usr/lib/modules/6.1"\n'
FILLED = {
    "by the bootstrap tool": f"{HEAD}exec head -c 64M /dev/zero >$root/packages\n",
    "by the builder": f"{HEAD}head -c 10M /dev/zero >$root/boot/vmlinuz-6.1\n",
}


def make_bootstrap(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "mmdebstrap").write_text(text)
    (folder / "mmdebstrap").chmod(0o755)


@pytest.mark.parametrize("who", FILLED)
def test_a_full_disk_is_said_and_nothing_is_left(tmp_path: Path, who: str) -> None:
    make_bootstrap(tmp_path / "bin", FILLED[who])
    images = tmp_path / "images"
    images.mkdir()
    path = [str(Path(build.__file__).parents[1]), str(Path(__file__).parents[1])]
    script = BUILD.format(path=path, images=str(images), tools=str(tmp_path / "bin"))
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    fact, hint, left = done.stdout.splitlines()
    assert fact.startswith(f"the disk of {images} is full: ")
    assert hint == "Make room, for example: sudo vmsilo image gc"
    files = ("", "/initrd", "/manifest.json", "/packages.json", "/root.erofs", "/vmlinuz")
    whole = [f"web/{FIRST}{file}" for file in files]
    assert left == str(sorted([".lock", "web", "web/current", *whole]))


def test_nobody_builds_where_others_can_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    order = build.Order("web", Recipe(), tmp_path, GuestFiles(tmp_path, ()), tmp_path / "checked")
    with pytest.raises(ImageError, match="can be written by others than root"):
        build.build_image(order, Progress(sys.stderr, "x"))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_two_builds_of_one_image_at_once(tmp_path: Path) -> None:
    """Neither sees the other; who is done last is current, the other one previous."""
    with store.private_build(tmp_path) as first, store.private_build(tmp_path) as second:
        for work, version in ((first, FIRST), (second, SECOND)):
            make_version(tmp_path / "elsewhere", "web", version)
            (tmp_path / "elsewhere/web" / version).rename(work / "out")
        store.publish(tmp_path, "web", second / "out", SECOND)
        assert store.remove_leftovers(tmp_path) == []
        store.publish(tmp_path, "web", first / "out", FIRST)
    assert store.read_link(tmp_path / "web/current") == FIRST
    assert store.read_link(tmp_path / "web/previous") == SECOND
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".lock"]


def test_nobody_but_root_can_hold_up_the_store(tmp_path: Path) -> None:
    """flock(2) needs no right to write: who may open the file may lock it."""
    (tmp_path / ".lock").touch(0o644)
    with store.hold_store(tmp_path):
        assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("compression", ["none", "lz4", "lz4hc"])
def test_the_root_is_compressed_or_not_as_the_recipe_says(tmp_path: Path, compression: str) -> None:
    """By what mkfs.erofs really does; all of it is text, which any compression halves at least."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "text").write_text("all work and no play\n" * 400_000)
    (tmp_path / "log").touch()
    image = tmp_path / "root.erofs"
    recipe = Recipe.model_validate({"compression": compression})
    build.pack_root(recipe, root, image, Progress(sys.stderr, "x"), tmp_path / "log")
    assert image.stat().st_size % build.ROOT_ALIGNMENT == 0
    dumped = subprocess.run(["dump.erofs", "-s", image], capture_output=True, text=True, check=True).stdout
    assert ("0padding" in dumped) == (compression != "none")
    assert (image.stat().st_size < 4_000_000) == (compression != "none")
