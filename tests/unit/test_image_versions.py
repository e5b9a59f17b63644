"""Switching, rolling back, listing and comparing versions, by the command line."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING

import pytest
from image_tree import FIRST, RECIPE, SECOND, THIRD, make_version
from vmsilo_image.__main__ import main
from vmsilo_image.contents import describe_recipe, list_packages
from vmsilo_image.recipe import Recipe
from vmsilo_image.versions import find_previous

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: images are root's")
Out = pytest.CaptureFixture[str]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for version in (FIRST, SECOND, THIRD):
        make_version(tmp_path / "images", "web", version)
    (tmp_path / "state").mkdir()
    return tmp_path / "images"


def run(images: Path, *words: str) -> int:
    places = {"images": images, "state": images.parent / "state", "checked": images.parent / "checked"}
    return main([*(f"--{name}={path}" for name, path in places.items()), *words])


def current(images: Path, name: str = "web") -> str:
    return str((images / name / "current").readlink())


def test_a_roll_back_and_the_way_forward_again(images: Path, capsys: Out) -> None:
    assert run(images, "use", "web", "previous") == 0
    assert capsys.readouterr().out == f"web: {SECOND} is current now, {THIRD} was\n"
    assert current(images) == SECOND
    assert run(images, "use", "web", "previous") == 0
    assert current(images) == THIRD
    assert run(images, "use", "web", "20260101") == 0
    assert current(images) == FIRST
    assert find_previous(images / "web") == THIRD
    capsys.readouterr()
    assert run(images, "use", "web", FIRST) == 0
    assert "current already" in capsys.readouterr().out
    assert find_previous(images / "web") == THIRD


def test_use_names_the_vms_that_go_on_with_the_old_one(images: Path, capsys: Out) -> None:
    for vm, image, version in (("a", "web", THIRD), ("b", "web", SECOND), ("c", "mail", THIRD)):
        text = json.dumps({"config": json.dumps({"image": image}), "version": version})
        (images.parent / f"state/{vm}.json").write_text(text)
    assert run(images, "use", "web", SECOND) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"VM a goes on with {THIRD} until it is restarted"]


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (("web", "2026"), "more than one version '2026'"),
        (("web", "2025"), "no version '2025'"),
        (("web", ""), "no version ''"),
        (("mail", "previous"), "there is no image mail"),
        (("../x", "previous"), "is not an image name"),
    ],
)
def test_use_of_what_there_is_not(images: Path, words: tuple[str, str], fact: str, capsys: Out) -> None:
    assert run(images, "use", *words) == 1
    assert fact in capsys.readouterr().err
    assert current(images) == THIRD


def test_use_refuses_what_is_not_whole(images: Path, capsys: Out) -> None:
    (images / "web" / SECOND / "vmlinuz").write_bytes(b"kernle")
    assert run(images, "use", "web", SECOND) == 1
    assert "vmlinuz is altered: its SHA-256 is not that of the build" in capsys.readouterr().err
    assert current(images) == THIRD


def test_previous_is_found_where_nothing_says_it(images: Path) -> None:
    (images / "web/previous").unlink()
    assert find_previous(images / "web") == SECOND
    (images / "web/previous").symlink_to("gone")
    assert find_previous(images / "web") == SECOND
    (images / "web/current").unlink()
    (images / "web/current").symlink_to(FIRST)
    assert find_previous(images / "web") == THIRD
    shutil.rmtree(images / "web" / SECOND)
    shutil.rmtree(images / "web" / THIRD)
    assert find_previous(images / "web") is None


def test_the_list_shows_states_and_what_is_broken(images: Path, capsys: Out) -> None:
    (images / "web" / FIRST / "manifest.json").write_text("{")
    assert run(images, "list", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["version"], row["current"], row["previous"], row["broken"]) for row in rows] == [
        (THIRD, True, False, False),
        (SECOND, False, True, False),
        (FIRST, False, False, True),
    ]
    assert rows[0]["disk"] >= rows[0]["size"] > 0
    assert run(images, "list") == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [
        "current",
        "previous",
        "broken",
    ]


def test_diff(images: Path, capsys: Out) -> None:
    recipe = {**RECIPE, "compression": "none", "packages": ["foot", "vim"], "files": {"/etc/motd": "0644"}}
    packages = {"foot": "1.1", "vim": "9"}
    make_version(
        images, "mail", FIRST, packages={"foot": "1.0", "nano": "8"}, agent_sha256="a", kernel="6.1"
    )
    make_version(
        images,
        "mail",
        SECOND,
        b"x" * (3 << 20),
        packages=packages,
        recipe=recipe,
        agent_sha256="b",
        kernel="6.2",
    )
    assert run(images, "diff", "mail") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"mail/{FIRST} -> mail/{SECOND}",
        "root.erofs: 0 MiB -> 3 MiB (+3.0 MiB)",
        "agent: other",
        "kernel: 6.1 -> 6.2",
        "recipe: ~ compression lz4 -> none",
        "recipe: + files: /etc/motd 0644",
        "recipe: + packages: vim",
        "packages: 1 added, 1 removed, 1 changed",
        "  ~ foot 1.0 -> 1.1",
        "  - nano 8",
        "  + vim 9",
    ]
    assert run(images, "diff", "web", f"mail/{SECOND}", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["old"], shown["new"]) == (f"web/{THIRD}", f"mail/{SECOND}")
    assert shown["packages"]["vim"] == [None, "9"]


def test_diff_of_a_version_without_a_list_of_packages(images: Path, capsys: Out) -> None:
    (images / "web" / SECOND / "packages.json").unlink()
    assert run(images, "diff", "web") == 0
    assert "packages: one of the two was built without a list of them" in capsys.readouterr().out


def test_packages_are_those_that_dpkg_has_installed(tmp_path: Path) -> None:
    status = tmp_path / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    status.write_text(
        "Package: foot\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1.0-1\n"
        "Description: a terminal\n Version: 7 is not a field\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nVersion: 2\n\n"
        "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 3\n\n"
        "Package: libc6\nStatus: install ok installed\nArchitecture: i386\nVersion: 3\n"
    )
    assert list_packages(tmp_path) == {"foot": "1.0-1", "libc6": "3", "libc6:i386": "3"}


def test_the_manifest_has_no_content_of_the_recipes_files(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    entry = {"path": "/etc/a", "content": "secret"}
    other = {"path": "/etc/b", "source": str(tmp_path / "key"), "mode": "0600"}
    described = describe_recipe(Recipe.model_validate({"files": [entry, other]}))
    assert "secret" not in json.dumps(described)
    assert described["files"]["/etc/a"].split()[2] == described["files"]["/etc/b"].split()[2]
    assert described["files"]["/etc/b"].startswith("0600 root:root ")


def test_verify_tells_good_from_bad(images: Path, capsys: Out) -> None:
    assert run(images, "verify") == 0
    assert capsys.readouterr().out.count("good") == 3
    (images / "web" / SECOND / "root.erofs").write_bytes(b"r")
    assert run(images, "verify", "web") == 1
    out, err = capsys.readouterr()
    assert [line.split()[2] for line in out.splitlines()] == ["good", "BAD:", "good"]
    assert "one version is not as built" in err
    assert run(images, "verify", "web", "current") == 0
