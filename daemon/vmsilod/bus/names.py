"""VM names on the bus: the alphabet that a name must have, and object paths.

Pure functions for the rest of the bus package. Whether a VM of that name exists is not their business.
"""

from __future__ import annotations

import re

from vmsilod.errors import BadRequest

SERVICE = "org.vmsilo1"
ROOT_PATH = "/org/vmsilo1"
VM_ROOT_PATH = "/org/vmsilo1/vm"

# What may go into polkit details and an object path; the configuration may allow less, never more.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ESCAPE = re.compile(r"_([0-9a-f]{2})")


def check_name(untrusted_name: str) -> str:
    """The name, if its letters are those of a VM name; else BadRequest."""
    if not _NAME.fullmatch(untrusted_name):
        raise BadRequest("not a VM name", "a name has 1 to 63 letters, digits, dots, dashes and underscores")
    return untrusted_name


def vm_path(name: str) -> str:
    """The object path of a VM; bytes are escaped as sd_bus_path_encode(3) does it."""
    return f"{VM_ROOT_PATH}/{escape_label(name)}"


def parse_vm_path(path: str) -> str:
    """The inverse of `vm_path`; ValueError for anything else."""
    prefix, _, label = path.rpartition("/")
    if prefix != VM_ROOT_PATH or not label:
        raise ValueError(f"not the path of a VM: {path!r}")
    name = unescape_label(label)
    if escape_label(name) != label:
        raise ValueError(f"not the path of a VM: {path!r}")
    return name


def escape_label(text: str) -> str:
    if not text:
        return "_"
    data = text.encode()
    return "".join(
        chr(byte) if _is_plain(byte) and not (index == 0 and chr(byte).isdigit()) else f"_{byte:02x}"
        for index, byte in enumerate(data)
    )


def unescape_label(label: str) -> str:
    if label == "_":
        return ""
    data = _ESCAPE.sub(lambda match: chr(int(match[1], 16)), label).encode("latin-1")
    return data.decode("utf-8")


def _is_plain(byte: int) -> bool:
    return byte < 0x80 and chr(byte).isalnum()
