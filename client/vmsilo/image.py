"""vmsilo image: the list of images with the VMs that use them; everything else is vmsilo-image's.

vmsilo-image knows the versions, vmsilod the VMs. Where vmsilod cannot be asked, or does not answer this
caller, the list says so and goes without VMs.
"""

import os
import subprocess
import sys

from vmsilo.bus import Bus
from vmsilo.errors import ClientError, UsageError, printable, write_stderr
from vmsilo.options import parse_options
from vmsilo.place import Place
from vmsilo.tables import align, join, print_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

USAGE = """\
Usage: vmsilo image COMMAND [ARGUMENT]...

  list [--json]                    images, their versions, and the VMs that use them
  build NAME [--recipe FILE]       build a new version and make it current
  use NAME VERSION|previous        make another version current, such as the one before
  diff NAME | diff A B             packages, recipe and sizes of two versions (NAME or NAME/VERSION)
  verify [NAME [VERSION]]          read every byte and compare it with what was built
  rm NAME VERSION... | rm NAME --all   remove versions that no VM runs from
  gc [NAME] [--keep N] [--dry-run]     remove versions that nobody needs, and what was left behind
  path NAME                        the directory of the current version

A version may be shortened to a beginning that no other version of the image has. All but list, diff, verify
and path need root. vmsilo image COMMAND --help shows a command's options.

Exit status: 0 done, 1 failed, 2 wrong command line.
"""
HEADINGS = ("IMAGE", "VERSION", "STATE", "DISK", "BUILT", "VMS")


def main(argv: list[str], place: Place) -> int:
    if not argv or argv[0] in ("help", "--help", "-h"):
        print_text(USAGE)
        return 0
    program = f"{place.libdir}/bin/vmsilo-image"
    if argv[0] != "list" or "--help" in argv or "-h" in argv:
        try:
            os.execv(program, [program, *argv])
        except OSError as exc:
            raise ClientError(f"cannot execute {program}: {exc.strerror}") from exc
    options, rest = parse_options(argv[1:], ("--json",), ("--images",))
    if rest:
        raise UsageError("vmsilo image list takes no more arguments")
    versions = _list_versions(program, options.get("--images", []))
    vms, why = _find_vms(place)
    if "--json" in options:
        import json

        print_text(json.dumps([row | {"vms": _users(row, vms)} for row in versions], indent=2) + "\n")
        return 0
    print_text(_table(versions, vms))
    if why is not None:
        write_stderr(f"vmsilo: the VMs are not shown: {why.fact}\n")
    return 0


def _list_versions(program: str, images: list[str]) -> "list[dict[str, Any]]":
    import json

    argv = [program, *(f"--images={path}" for path in images[-1:]), "list", "--json"]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
        found: list[dict[str, Any]] = json.loads(done.stdout)
    except OSError as exc:
        raise ClientError(f"cannot execute {program}: {exc.strerror}") from exc
    except ValueError as exc:
        raise ClientError(f"{program} printed no list") from exc
    return found


def _find_vms(place: Place) -> "tuple[list[dict[str, Any]] | None, ClientError | None]":
    try:
        bus = Bus(place)
        try:
            return bus.find_vms(), None
        finally:
            bus.close()
    except ClientError as error:
        return None, error


def _users(row: "dict[str, Any]", vms: "list[dict[str, Any]] | None") -> "list[dict[str, Any]] | None":
    """The VMs that run from this version, and those that would start from it."""
    if vms is None:
        return None
    found = []
    for vm in sorted(vms, key=lambda vm: str(vm.get("Name"))):
        used = vm.get("ImageVersion") or ""
        if vm.get("Image") == row["name"] and (used == row["version"] or (not used and row["current"])):
            found.append({"name": str(vm.get("Name")), "running": bool(used)})
    return found


def _table(versions: "list[dict[str, Any]]", vms: "list[dict[str, Any]] | None") -> str:
    rows = [HEADINGS] if versions else []
    for row in versions:
        users = [user["name"] + (" (running)" if user["running"] else "") for user in _users(row, vms) or []]
        state = [word for word in ("current", "previous", "broken") if row[word]]
        built = printable(row["built"][:19].replace("T", " "))
        rows.append(
            (
                printable(row["name"], 40),
                printable(row["version"], 40),
                ", ".join(state) or "-",
                f"{row['disk'] / (1 << 20):.0f} MiB",
                built or "-",
                printable(", ".join(users), 200) or "-",
            )
        )
    lines = [join(cells) for cells in align(rows)]
    if not versions:
        lines.append("There is no image yet: sudo vmsilo image build default")
    known = {row["name"] for row in versions if row["current"]}
    for image, names in _missing(vms or [], known).items():
        lines.append(f"no current version: {printable(image, 40)}, for {printable(', '.join(names), 200)}")
    if len(versions) > 1:
        lines.append(f"{sum(row['disk'] for row in versions) / (1 << 20):.0f} MiB in all")
    return "\n".join(lines) + "\n"


def _missing(vms: "list[dict[str, Any]]", known: "set[str]") -> "dict[str, list[str]]":
    """Images that VMs are configured for and that nobody could start from."""
    found: dict[str, list[str]] = {}
    for vm in vms:
        image = str(vm.get("Image") or "")
        if image and image not in known and vm.get("ImageVersion") != "custom":
            found.setdefault(image, []).append(str(vm.get("Name")))
    return found
