"""Recipes as a person writes them: what is accepted, what is refused, and how problems are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from vmsilo_image.errors import ImageError
from vmsilo_image.recipe import check_name, find_recipe, load_recipe

BUILTIN = Path(__file__).parents[2] / "guest" / "image" / "default.toml"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def test_builtin_recipe_is_valid_and_complete() -> None:
    recipe = load_recipe(BUILTIN, BUILTIN)
    assert {"systemd", "systemd-sysv", "python3", "busybox-static"} <= set(recipe.packages)
    assert recipe.size_limit == 4 << 30


def test_recipe_extends_default(tmp_path: Path) -> None:
    path = write(tmp_path, "web", 'packages = ["firefox-esr", "udev"]\nuser = "alice"\n')
    recipe = load_recipe(path, BUILTIN, (tmp_path,))
    assert "systemd" in recipe.packages
    assert recipe.packages[-1] == "firefox-esr"
    assert recipe.packages.count("udev") == 1
    assert (recipe.user, recipe.suite) == ("alice", "trixie")


def test_include_none_starts_from_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "bare", 'include = "none"\npackages = ["systemd"]\n')
    assert load_recipe(path, BUILTIN, (tmp_path,)).packages == ("systemd",)


def test_own_default_extends_the_builtin_one(tmp_path: Path) -> None:
    path = write(tmp_path, "default", 'packages = ["foot"]\n')
    assert {"foot", "systemd"} <= set(load_recipe(path, BUILTIN, (tmp_path,)).packages)


def test_file_of_outer_recipe_wins_and_sources_are_relative_to_their_recipe(tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    inner.mkdir()
    outer.mkdir()
    entries = '[[files]]\npath = "/etc/a"\nsource = "a"\n[[files]]\npath = "/etc/b"\nsource = "b"\n'
    write(inner, "base", f'include = "none"\n{entries}')
    path = write(outer, "top", 'include = "base"\n[[files]]\npath = "/etc/b"\ncontent = "x"\n')
    files = {entry.path: entry for entry in load_recipe(path, BUILTIN, (inner,)).files}
    assert files["/etc/a"].source == inner / "a"
    assert files["/etc/b"].content == "x"


def test_all_problems_of_all_files_at_once(tmp_path: Path) -> None:
    write(tmp_path, "base", 'include = "none"\nsuit = "trixie"\n')
    path = write(tmp_path, "top", 'include = "base"\nuid = 5\npackages = ["ok", "no; rm"]\ncolour = 1\n')
    with pytest.raises(ImageError) as caught:
        load_recipe(path, BUILTIN, (tmp_path,))
    lines = caught.value.fact.splitlines()
    assert len(lines) == 4
    assert f"{tmp_path}/base.toml: suit: unknown key" in lines
    assert f"{tmp_path}/top.toml: colour: unknown key" in lines
    assert any(line.startswith(f"{tmp_path}/top.toml: uid:") for line in lines)
    assert any(line.startswith(f"{tmp_path}/top.toml: packages.1:") for line in lines)


def test_circle_of_includes_is_told(tmp_path: Path) -> None:
    write(tmp_path, "a", 'include = "b"\n')
    path = write(tmp_path, "b", 'include = "a"\n')
    with pytest.raises(ImageError, match="does not end"):
        load_recipe(path, BUILTIN, (tmp_path,))


@pytest.mark.parametrize(
    "text",
    [
        'suite = "trixie --mode=root"\n',
        'packages = ["-o"]\n',
        'packages = ["a,b"]\n',
        'kernel = "../x"\n',
        'user = "root"\n',
        'user = "a:b"\n',
        "uid = 0\n",
        'size_limit = "4 GiB"\n',
        'size_limit = "1K"\n',
        'compression = "zip"\n',
        '[[files]]\npath = "/etc/../../x"\ncontent = ""\n',
        '[[files]]\npath = "etc/x"\ncontent = ""\n',
        '[[files]]\npath = "/etc/x"\n',
        '[[files]]\npath = "/etc/x"\ncontent = ""\nsource = "y"\n',
        '[[files]]\npath = "/etc/x"\ncontent = ""\nmode = "999"\n',
        "packages = [\n",
    ],
)
def test_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "bad", text)
    with pytest.raises(ImageError, match=r"bad\.toml"):
        load_recipe(path, BUILTIN, (tmp_path,))


def test_search_order_and_unknown_name(tmp_path: Path) -> None:
    first, second = tmp_path / "etc", tmp_path / "usr"
    first.mkdir()
    second.mkdir()
    write(second, "web", "")
    assert find_recipe("web", BUILTIN, (first, second)).parent == second
    write(first, "web", "")
    assert find_recipe("web", BUILTIN, (first, second)).parent == first
    assert find_recipe("default", BUILTIN, (first, second)) == BUILTIN
    with pytest.raises(ImageError, match="no recipe mail"):
        find_recipe("mail", BUILTIN, (first, second))


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", ".build-1", "Web", "x" * 33])
def test_image_names(name: str) -> None:
    with pytest.raises(ImageError):
        check_name(name)


def test_digest_follows_content(tmp_path: Path) -> None:
    one = load_recipe(write(tmp_path, "one", ""), BUILTIN)
    same = load_recipe(write(tmp_path, "two", "# comment\n"), BUILTIN)
    other = load_recipe(write(tmp_path, "three", "uid = 1001\n"), BUILTIN)
    assert one.digest() == same.digest() != other.digest()
