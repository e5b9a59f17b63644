"""What the commands that list things write to standard output: text, JSON, aligned columns."""

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def print_text(text: str) -> None:
    data = text.encode("utf-8", "replace")
    while data:
        data = data[os.write(1, data) :]


def print_json(value: object) -> None:
    import json

    print_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def align(rows: "Sequence[Sequence[str]]") -> list[list[str]]:
    """The same cells, each as wide as the widest of its column. All rows are as long as the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]


def join(cells: "Sequence[str]") -> str:
    return "  ".join(cells).rstrip()


def print_table(rows: "Sequence[Sequence[str]]") -> None:
    """The first row is the headings."""
    print_text("".join(f"{join(cells)}\n" for cells in align(rows)))
