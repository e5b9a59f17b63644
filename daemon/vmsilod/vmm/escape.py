"""Values inside `key=value,key=value` options of crosvm and QEMU.

Called by the drivers for every value that is not a literal of theirs. Pure. A value that no quoting can
carry is refused, never changed.
"""

from __future__ import annotations

import re

from vmsilod.vmm.errors import BadOptionValue

_CROSVM_BARE = re.compile(r"[A-Za-z0-9_./:@%+-]+")
# A C0 or C1 control character in a path of ours is a mistake or an attack, and would reach a terminal with
# the argv.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def quote_crosvm(value: str) -> str:
    """One value of crosvm's key=value grammar (serde_keyvalue): bare where that is safe, else "..." with \\"
    and \\\\.
    """
    _check_text(value)
    # `true`, `false` and numbers are guessed to be such in untagged enums (--net tap-name=123).
    if (
        _CROSVM_BARE.fullmatch(value)
        and not value[0].isdigit()
        and not value.startswith(("true", "false", "-"))
    ):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def quote_qemu(value: str) -> str:
    """One value of QEMU's option grammar (QemuOpts): a comma is written twice, nothing else is special."""
    _check_text(value)
    return value.replace(",", ",,")


def quote_cloud_hypervisor(value: str) -> str:
    """One value of cloud-hypervisor's option grammar (option_parser): in "...", with " written twice, unless
    it is safe bare.
    """
    _check_text(value)
    return value if _CROSVM_BARE.fullmatch(value) else '"' + value.replace('"', '""') + '"'


def check_argument(value: str) -> str:
    """A whole argv element that is a value: it must not be read as an option (crosvm splits those at `=`,
    too).
    """
    _check_text(value)
    if value.startswith("-"):
        raise BadOptionValue(f"{value!r} starts with a dash, so it would be read as an option")
    return value


def _check_text(value: str) -> None:
    if not value:
        raise BadOptionValue("an empty value cannot be passed to a VMM")
    if match := _CONTROL.search(value):
        raise BadOptionValue(
            f"{value!r} has the control character {match[0]!r}, which cannot be passed to a VMM"
        )
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        # crosvm's arguments are UTF-8 strings: it panics on anything else.
        raise BadOptionValue(f"{value!r} is not valid UTF-8") from exc
