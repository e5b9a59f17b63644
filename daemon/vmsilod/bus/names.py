"""VM names on the bus: the alphabet that a name must have, and object paths.

Pure functions for the rest of the bus package. Whether a VM of that name exists is not their business.
"""

from __future__ import annotations

import re

from vmsilod.errors import BadRequest
from vmsilod.systemd import escape_label

SERVICE = "org.vmsilo1"
ROOT_PATH = "/org/vmsilo1"
VM_ROOT_PATH = "/org/vmsilo1/vm"

# What may go into polkit details and an object path; the configuration may allow less, never more.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_name(untrusted_name: str) -> str:
    """The name, if its letters are those of a VM name; else BadRequest."""
    if not _NAME.fullmatch(untrusted_name):
        raise BadRequest("not a VM name", "a name has 1 to 63 letters, digits, dots, dashes and underscores")
    return untrusted_name


def vm_path(name: str) -> str:
    """The object path of a VM; bytes are escaped as sd_bus_path_encode(3) does it."""
    return f"{VM_ROOT_PATH}/{escape_label(name)}"
