"""Command line of vmsilo-image. The only place that prints errors and chooses exit statuses: 1 for a fact
about images or this host, 2 for a wrong command line, 128 + n for signal n.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import store
from .build import Interrupted, Order, build_image
from .errors import ImageError
from .progress import Progress
from .recipe import check_name, find_recipe, load_recipe
from .rootfs import find_guest_files
from .tools import check_tools

if TYPE_CHECKING:
    from collections.abc import Sequence

IMAGES = Path("/var/lib/vmsilo/images")
PROGRAM = "vmsilo-image"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    commands = {"build": run_build, "list": run_list, "path": run_path, "clean": run_clean}
    try:
        commands[arguments.command](arguments)
    except ImageError as error:
        for line in error.fact.splitlines():
            sys.stderr.write(f"{PROGRAM}: {line}\n")
        if error.hint:
            sys.stderr.write(f"hint: {error.hint}\n")
        return 1
    except Interrupted as stop:
        sys.stderr.write(f"{PROGRAM}: interrupted, nothing is left behind\n")
        return 128 + stop.number
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Builds and lists the images of vmsilo's VMs."
    )
    parser.add_argument("--images", type=Path, default=IMAGES, metavar="DIR", help=f"default {IMAGES}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Accepted after the command too, where people type it.
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--images", type=Path, default=argparse.SUPPRESS, metavar="DIR", help=argparse.SUPPRESS
    )
    build = commands.add_parser("build", parents=[shared], help="build a new version and make it current")
    build.add_argument("name", metavar="NAME")
    build.add_argument("--recipe", type=Path, metavar="FILE", help="instead of the recipe found by NAME")
    build.add_argument("--json", action="store_true", help="print the manifest instead of the path")
    listing = commands.add_parser("list", parents=[shared], help="list all versions of all images")
    listing.add_argument("--json", action="store_true")
    path = commands.add_parser("path", parents=[shared], help="print the directory of the current version")
    path.add_argument("name", metavar="NAME")
    commands.add_parser("clean", parents=[shared], help="remove what a killed build has left")
    arguments = parser.parse_args(argv)
    arguments.images = arguments.images.absolute()
    return arguments


def run_build(arguments: argparse.Namespace) -> None:
    name = check_name(arguments.name)
    guest = find_guest_files(Path(__file__).resolve().parent)
    builtin = guest.image / "default.toml"
    path = arguments.recipe or find_recipe(name, builtin)
    recipe = load_recipe(path.absolute(), builtin)
    check_root("build")
    check_tools()
    order = Order(name, recipe, arguments.images, guest)
    built = build_image(order, Progress(sys.stderr, f"{PROGRAM} {name}"))
    text = (built / store.MANIFEST).read_text() if arguments.json else f"{built}\n"
    sys.stdout.write(text)


def run_path(arguments: argparse.Namespace) -> None:
    sys.stdout.write(f"{store.find_current(arguments.images, check_name(arguments.name))}\n")


def run_list(arguments: argparse.Namespace) -> None:
    versions = store.list_versions(arguments.images)
    if arguments.json:
        rows = [{**vars(each), "path": str(each.path)} for each in versions]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    width = max((len(each.name) for each in versions), default=0)
    for each in versions:
        mark = "current" if each.current else ""
        size = f"{each.size / (1 << 20):.0f} MiB"
        row = f"{each.name:<{width}}  {each.version}  {size:>9}  {each.built[:19].replace('T', ' ')}  {mark}"
        sys.stdout.write(row.rstrip() + "\n")


def run_clean(arguments: argparse.Namespace) -> None:
    check_root("clean")
    for name in store.clean_store(arguments.images):
        sys.stdout.write(f"{name}\n")


def check_root(command: str) -> None:
    if os.geteuid() != 0:
        raise ImageError(f"only root may {command} images", f"Run: sudo {PROGRAM} {command} ...")


if __name__ == "__main__":
    sys.exit(main())
