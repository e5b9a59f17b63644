"""Problems: one fact about one key of one file, and pydantic's errors told in that form.

Called by the loader and the checks of this package. Text that came out of a file is escaped here before
it is shown, so that a key or a file name with terminal escapes in it stays text.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from pydantic_core import ErrorDetails

UNITS: Mapping[str, str] = {"memory": " MiB", "start_timeout": " seconds", "stop_timeout": " seconds"}

# Options of the reference project whose feature this version does not have: a spelling hint would mislead.
NOT_YET = frozenset(
    {
        "auto_shutdown",
        "balloond",
        "gpu",
        "guest_config",
        "guest_programs",
        "sound",
        "vm_switch",
        "vmsilo_balloond",
        "enable_bash_integration",
        "wayland_proxy",
    }
)
TYPE_NAMES: Mapping[str, str] = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "string_type": "a string",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a table",
    "model_attributes_type": "a table",
}


@dataclass(frozen=True)
class Problem:
    """`key` is a dotted path ("crosvm.log_level") or empty; `vm` is the VM that the problem disables."""

    file: str
    key: str
    fact: str
    hint: str = ""
    vm: str | None = None

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.key, self.fact) if part)


def printable(text: object) -> str:
    """`text` with everything that is not printable escaped, bytes that are not UTF-8 included."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def shown(value: object) -> str:
    """A value of a file as a message shows it: quoted, escaped and not longer than a line."""
    text = f"'{printable(value)}'" if isinstance(value, str) else printable(value)
    if isinstance(value, bool):
        text = text.lower()
    return text if len(text) <= 80 else text[:77] + "..."


def snake_case(key: str) -> str:
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", key).replace("-", "_").lower()


def describe_unknown_key(key: str, known: Collection[str]) -> tuple[str, str]:
    """Fact and hint for a key that no model has."""
    fact = f"unknown key {shown(key)}"
    snake = snake_case(key)
    if snake not in known and snake in NOT_YET:
        return fact, "this version of vmsilo has no such option"
    close = [snake] if snake in known else difflib.get_close_matches(snake, known, n=1)
    if close:
        return f"{fact} (did you mean '{close[0]}'?)", ""
    return fact, "known keys: " + ", ".join(sorted(known))


def describe_error(error: ErrorDetails, known: Collection[str]) -> tuple[str, str]:
    """Fact and hint for one pydantic error; `known` are the keys of the table in which it happened."""
    kind, value = error["type"], error["input"]
    context: Mapping[str, Any] = error.get("ctx", {})
    unit = UNITS.get(str(error["loc"][-1]) if error["loc"] else "", "")
    if kind == "missing":
        return "required, but not set", ""
    if kind == "extra_forbidden":
        return describe_unknown_key(str(error["loc"][-1]), known)
    if kind == "greater_than_equal":
        return f"{shown(value)} is below {context['ge']}{unit}", ""
    if kind == "less_than_equal":
        return f"{shown(value)} is above {context['le']}{unit}", ""
    if kind == "literal_error":
        return f"{shown(value)} is not one of {context['expected']}", ""
    if kind == "value_error":
        return printable(context["error"]), ""
    if kind in TYPE_NAMES:
        return f"{shown(value)} is not {TYPE_NAMES[kind]}", ""
    return printable(error["msg"]), ""
