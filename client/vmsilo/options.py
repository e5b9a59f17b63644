"""Command lines by hand: argparse alone would take longer than a warm `vm-run`."""

from vmsilo.errors import UsageError, printable


def parse_options(
    argv: list[str], flags: tuple[str, ...], valued: tuple[str, ...], *, interleaved: bool = True
) -> tuple[dict[str, list[str]], list[str]]:
    """Options with their values in the order given, and what is left over.

    `--` ends the options. Not interleaved: so does the first argument that is none.
    """
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    at = 0
    while at < len(argv):
        arg = argv[at]
        at += 1
        if arg == "--":
            return found, rest + argv[at:]
        if not arg.startswith("-") or arg == "-":
            rest.append(arg)
            if not interleaved:
                return found, rest + argv[at:]
            continue
        name, equals, value = arg.partition("=")
        if name in flags and not equals:
            found.setdefault(name, []).append("")
        elif name in valued:
            if not equals:
                if at == len(argv):
                    raise UsageError(f"{name} needs a value")
                value = argv[at]
                at += 1
            found.setdefault(name, []).append(value)
        else:
            raise UsageError(f"unknown option '{printable(arg, 60)}'")
    return found, rest


def parse_seconds(option: str, text: str, *, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 8 and 1 <= int(text) <= most):
        raise UsageError(f"{option} takes seconds from 1 to {most}, not '{printable(text, 40)}'")
    return int(text)


def parse_escapes(options: dict[str, list[str]]) -> bool:
    """True if everything may reach the terminal."""
    value = options.get("--escapes", ["colour"])[-1]
    if value not in ("colour", "color", "all"):
        raise UsageError(f"--escapes takes 'colour' or 'all', not '{printable(value, 40)}'")
    return value == "all"
