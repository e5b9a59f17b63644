"""The commands of vmsilo-image that look at versions, switch, compare and remove them, and what they print.
Called by __main__, which prints errors; the build is build.py's.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from . import integrity, removal, store
from .contents import compare
from .errors import ImageError
from .recipe import check_name
from .removal import Places
from .tools import printable
from .usage import load_uses
from .versions import find_current, find_version, list_versions

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from .contents import Difference
    from .versions import Version


def run_path(arguments: argparse.Namespace) -> None:
    _say(find_current(arguments.images, check_name(arguments.name)))


def run_list(arguments: argparse.Namespace) -> None:
    versions = list_versions(arguments.images)
    if arguments.json:
        _say_json([{**vars(each), "path": str(each.path)} for each in versions])
        return
    width = max((len(each.name) for each in versions), default=0)
    for each in versions:
        built = each.built[:19].replace("T", " ")
        row = (each.name.ljust(width), each.version, f"{_mib(each.disk):>9}", f"{built:<19}")
        _say("  ".join((*row, describe_state(each))).rstrip())


def describe_state(version: Version) -> str:
    words = ("current", version.current), ("previous", version.previous), ("broken", version.broken)
    return ", ".join(word for word, holds in words if holds)


def run_use(arguments: argparse.Namespace) -> None:
    """Checked as a whole before any VM can start from it."""
    check_root("use")
    name = check_name(arguments.name)
    path = find_version(arguments.images, name, arguments.version)
    integrity.verify_version(path, arguments.checked)
    with store.hold_store(arguments.images):
        if not path.is_dir():
            raise ImageError(f"{path} has just been removed", "vmsilo image list")
        before = store.read_link(path.parent / store.CURRENT)
        try:
            store.switch_current(path.parent, path.name)
        except OSError as error:
            raise ImageError(f"{path.parent} cannot be switched: {error.strerror}") from error
    if before == path.name:
        _say(f"{name}: {path.name} is current already")
        return
    _say(f"{name}: {path.name} is current now, {before or 'nothing'} was")
    for use in load_uses(arguments.state):
        if use.image == name and use.version not in (path.name, "custom"):
            _say(f"VM {use.vm} goes on with {use.version or 'what it has'} until it is restarted")


def run_verify(arguments: argparse.Namespace) -> None:
    """Reads every byte; one line per version, and an error at the end if one of them is bad."""
    if arguments.version:
        paths = [find_version(arguments.images, check_name(arguments.name), arguments.version)]
    else:
        paths = [each.path for each in _list_named(arguments)]
    bad = []
    for path in paths:
        try:
            integrity.verify_version(path, arguments.checked)
        except ImageError as error:
            bad.append(error)
            _say(f"{path.parent.name}  {path.name}  BAD: {error.fact}")
        else:
            _say(f"{path.parent.name}  {path.name}  good")
    if bad:
        count = "one version is" if len(bad) == 1 else f"{len(bad)} versions are"
        raise ImageError(f"{count} not as built", bad[0].hint)


def _list_named(arguments: argparse.Namespace) -> list[Version]:
    """Of the image that was named, or of all."""
    name = check_name(arguments.name) if arguments.name else None
    versions = list_versions(arguments.images, name)
    if name and not versions:
        raise ImageError(f"there is no image {name} in {arguments.images}", "vmsilo image list")
    return versions


def run_rm(arguments: argparse.Namespace) -> None:
    check_root("rm")
    name = check_name(arguments.name)
    places = Places(arguments.images, arguments.state, arguments.checked)
    if arguments.all == bool(arguments.versions):
        raise ImageError("say which versions to remove, or --all", f"vmsilo image rm {name} VERSION...")
    if arguments.all:
        for version in removal.remove_image(places, name):
            _say(f"{name}: {version} removed")
        return
    for path in dict.fromkeys(find_version(arguments.images, name, word) for word in arguments.versions):
        removal.remove_version(places, path)
        _say(f"{name}: {path.name} removed")


def run_gc(arguments: argparse.Namespace) -> None:
    check_root("gc")
    places = Places(arguments.images, arguments.state, arguments.checked)
    doomed = removal.plan_gc(_list_named(arguments), load_uses(arguments.state), arguments.keep)
    if arguments.dry_run:
        for each in doomed:
            _say(f"{each.name}: {each.version} would be removed ({_mib(each.disk)})")
        return
    gone, kept = removal.collect(places, doomed)
    for each in gone:
        _say(f"{each.name}: {each.version} removed ({_mib(each.disk)})")
    for leftover in store.remove_leftovers(arguments.images):
        _say(f"{leftover} removed")
    if kept:
        raise ImageError("\n".join(error.fact for error in kept), kept[0].hint)


def run_clean(arguments: argparse.Namespace) -> None:
    check_root("clean")
    for name in store.remove_leftovers(arguments.images):
        _say(name)


def run_diff(arguments: argparse.Namespace) -> None:
    """`diff NAME`: from the previous version to the current one. `diff A B`: each NAME or NAME/VERSION."""
    if arguments.new is None:
        name, _, version = arguments.old.partition("/")
        old = find_version(arguments.images, name, version or store.PREVIOUS)
        new = find_version(arguments.images, name, store.CURRENT)
    else:
        old, new = (_find_named(arguments.images, word) for word in (arguments.old, arguments.new))
    difference = compare(old, new)
    if arguments.json:
        _say_json(vars(difference))
        return
    for line in describe_difference(difference):
        _say(line)


def _find_named(images: Path, word: str) -> Path:
    name, _, version = word.partition("/")
    return find_version(images, name, version or store.CURRENT)


def describe_difference(difference: Difference) -> list[str]:
    lines = [f"{difference.old} -> {difference.new}"]
    for name, (before, after) in difference.sizes.items():
        if before != after:
            lines.append(
                f"{name}: {_mib(before)} -> {_mib(after)} ({(after - before) / (1 << 20):+.1f} MiB)"
            )
    for key, (before, after) in difference.facts.items():
        short = key.removesuffix("_sha256")
        lines.append(
            f"{short}: other"
            if short != key
            else f"{short}: {printable(str(before))} -> {printable(str(after))}"
        )
    for key, (before, after) in difference.recipe.items():
        lines.append(f"recipe: {_describe_change(key, before, after)}")
    if difference.packages is None:
        lines.append("packages: one of the two was built without a list of them")
    else:
        lines.append(f"packages: {_count(difference.packages)}")
        lines += [f"  {_describe_change(name, *pair)}" for name, pair in difference.packages.items()]
    return lines


def _describe_change(name: str, before: object, after: object) -> str:
    if before is None:
        return f"+ {name}" if after == "yes" else f"+ {name} {printable(str(after))}"
    if after is None:
        return f"- {name}" if before == "yes" else f"- {name} {printable(str(before))}"
    return f"~ {name} {printable(str(before))} -> {printable(str(after))}"


def _count(packages: dict[str, tuple[str | None, str | None]]) -> str:
    added = sum(before is None for before, _ in packages.values())
    removed = sum(after is None for _, after in packages.values())
    return f"{added} added, {removed} removed, {len(packages) - added - removed} changed"


def check_root(command: str) -> None:
    if os.geteuid() != 0:
        raise ImageError(
            f"images are root's: only root may {command} them", f"sudo vmsilo image {command} ..."
        )


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"


def _say(line: object) -> None:
    sys.stdout.write(f"{line}\n")


def _say_json(value: object) -> None:
    _say(json.dumps(value, indent=2))
