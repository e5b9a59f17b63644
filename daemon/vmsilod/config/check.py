"""The program `vmsilo-check` (`vmsilo check`): prints every problem of the configuration.

Run by an administrator or by the client, which execs it. Reads configuration files only, talks to no
daemon, changes nothing; lives for one check. Exit status: 0 no problem, 1 problems, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vmsilod.config.load import DEFAULT_ROOTS, load_configuration
from vmsilod.config.problems import Problem
from vmsilod.pci.initramfs import find_stale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsilod.config.load import Configuration


def format_problem(problem: Problem) -> str:
    return str(problem) + (f"\n    {problem.hint}" if problem.hint else "")


def find_warnings(configuration: Configuration) -> list[Problem]:
    warnings = list(configuration.warnings)
    if configuration.settings is not None:
        stale = find_stale(configuration.settings.isolated_pci_devices)
        if stale is not None:
            warnings.append(Problem("", "isolated_pci_devices", *stale))
    return warnings


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vmsilo-check", description="Check the configuration of vmsilo.")
    parser.add_argument("--json", action="store_true", help="print the problems as a JSON list")
    parser.add_argument(
        "--root",
        action="append",
        type=Path,
        metavar="DIR",
        help="directory with vmsilo.toml and vms.d/ (repeatable, lowest priority first; default: "
        + " ".join(str(root) for root in DEFAULT_ROOTS)
        + ")",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    configuration = load_configuration(arguments.root or DEFAULT_ROOTS)
    for warning in () if arguments.json else find_warnings(configuration):
        print(f"warning: {format_problem(warning)}")
    if arguments.json:
        print(json.dumps([dataclasses.asdict(problem) for problem in configuration.problems], indent=2))
    elif configuration.problems:
        for problem in configuration.problems:
            print(format_problem(problem))
    else:
        count = len(configuration.vms)
        print(f"{count} VM{'' if count == 1 else 's'}, no problems")
    return 1 if configuration.problems else 0


if __name__ == "__main__":
    sys.exit(main())
