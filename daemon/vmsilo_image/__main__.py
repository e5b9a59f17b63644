"""Command line of vmsilo-image. The only place that prints errors and chooses exit statuses: 1 for a fact
about images or this host, 2 for a wrong command line, 128 + n for signal n.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import commands, integrity, store, usage
from .build import Interrupted, Order, build_image
from .errors import ImageError
from .progress import Progress
from .recipe import check_name, find_recipe, load_recipe
from .rootfs import find_guest_files
from .tools import check_tools

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

IMAGES = Path("/var/lib/vmsilo/images")
PROGRAM = "vmsilo-image"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        run(arguments)
    except ImageError as error:
        for line in error.fact.splitlines():
            sys.stderr.write(f"{PROGRAM}: {line}\n")
        if error.hint:
            sys.stderr.write(f"hint: {error.hint}\n")
        return 1
    except Interrupted as stop:
        sys.stderr.write(f"{PROGRAM}: interrupted, nothing is left behind\n")
        return 128 + stop.number
    except KeyboardInterrupt:  # whatever it was about, gc goes on with it
        return 130
    except BrokenPipeError:
        return 141
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Builds, lists, switches, compares and removes the images of vmsilo's VMs."
    )
    parser.add_argument("--images", type=Path, default=IMAGES, metavar="DIR", help=f"default {IMAGES}")
    parser.add_argument("--state", type=Path, default=usage.STATE_DIR, help=argparse.SUPPRESS)
    parser.add_argument("--checked", type=Path, default=integrity.CHECKED_DIR, help=argparse.SUPPRESS)
    found = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Accepted after the command too, where people type it.
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--images", type=Path, default=argparse.SUPPRESS, metavar="DIR", help=argparse.SUPPRESS
    )

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = found.add_parser(name, parents=[shared], help=text, description=text.capitalize() + ".")
        command.set_defaults(run=run)
        return command

    build = add("build", run_build, "build a new version and make it current")
    build.add_argument("name", metavar="NAME")
    build.add_argument("--recipe", type=Path, metavar="FILE", help="instead of the recipe found by NAME")
    build.add_argument("--json", action="store_true", help="print the manifest instead of the path")
    listing = add("list", commands.run_list, "list all versions of all images")
    listing.add_argument("--json", action="store_true")
    use = add("use", commands.run_use, "make a version current: VMs start from it from now on")
    use.add_argument("name", metavar="NAME")
    use.add_argument("version", metavar="VERSION|previous")
    diff = add("diff", commands.run_diff, "show what differs: packages, recipe, sizes")
    diff.add_argument(
        "old", metavar="A", help="NAME or NAME/VERSION; NAME alone: its previous and current version"
    )
    diff.add_argument("new", metavar="B", nargs="?")
    diff.add_argument("--json", action="store_true")
    verify = add("verify", commands.run_verify, "read every byte and compare it with what was built")
    verify.add_argument("name", metavar="NAME", nargs="?")
    verify.add_argument("version", metavar="VERSION", nargs="?")
    rm = add("rm", commands.run_rm, "remove versions that no VM runs from")
    rm.add_argument("name", metavar="NAME")
    rm.add_argument("versions", metavar="VERSION", nargs="*")
    rm.add_argument("--all", action="store_true", help="the whole image")
    gc = add("gc", commands.run_gc, "remove versions that nobody needs, and what was left behind")
    gc.add_argument("name", metavar="NAME", nargs="?")
    gc.add_argument("--keep", type=parse_count, metavar="N", help="how many of the newest versions stay")
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    path = add("path", commands.run_path, "print the directory of the current version")
    path.add_argument("name", metavar="NAME")
    add("clean", commands.run_clean, "remove what a killed build or removal has left")
    arguments = parser.parse_args(argv)
    arguments.images = arguments.images.absolute()
    return arguments


def parse_count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1000):
        raise argparse.ArgumentTypeError("a number from 1 to 1000")
    return int(text)


def run_build(arguments: argparse.Namespace) -> None:
    name = check_name(arguments.name)
    guest = find_guest_files(Path(__file__).resolve().parent)
    builtin = guest.image / "default.toml"
    path = arguments.recipe or find_recipe(name, builtin)
    recipe = load_recipe(path.absolute(), builtin)
    commands.check_root("build")
    check_tools()
    order = Order(name, recipe, arguments.images, guest, arguments.checked)
    built = build_image(order, Progress(sys.stderr, f"{PROGRAM} {name}"))
    text = (built / store.MANIFEST).read_text() if arguments.json else f"{built}\n"
    sys.stdout.write(text)


if __name__ == "__main__":
    sys.exit(main())
