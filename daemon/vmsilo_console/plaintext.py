"""One line of a guest's console as harmless text for a log: `clean_line`, a pure function.

A guest is hostile: what is left has no control character, no escape sequence and no bidirectional control,
fits on one line, and is at most TEXT_MAX bytes of UTF-8. A sequence ends at the end of its line at the
latest, so that a broken one does not hide what comes after it. Linear in the length of the line.
"""

from __future__ import annotations

import re

RAW_MAX = 4096  # of a longer line the rest is not looked at
TEXT_MAX = 512
ELLIPSIS = "…"

SEQUENCES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # CSI
    r"|(?:\x1b[PX\]^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # DCS, SOS, OSC, PM, APC
    r"|\x1b[ -/]*[0-~]?"  # all other escapes, and a lone ESC
)
# \b and \r are dealt with before. Beside C0, DEL and C1: line separators and bidirectional controls.
REMOVED: dict[int, str | None] = {
    code: None
    for first, last in (
        (0x00, 0x1F),
        (0x7F, 0x9F),
        (0x061C, 0x061C),
        (0x200E, 0x200F),
        (0x2028, 0x202E),
        (0x2066, 0x2069),
    )
    for code in range(first, last + 1)
} | {ord("\t"): " "}


def clean_line(untrusted_line: bytes) -> bytes:
    """The text of a line given without its line feed; b"" where nothing is left to see."""
    text = untrusted_line[:RAW_MAX].decode("utf-8", "backslashreplace")
    text = SEQUENCES.sub("", text)
    if "\r" in text:
        text = find_last_overwrite(text)
    if "\b" in text:
        text = apply_backspaces(text)
    data = text.translate(REMOVED).strip().encode()
    if len(data) > TEXT_MAX:
        cut = data[: TEXT_MAX - len(ELLIPSIS.encode())]
        data = cut.decode("utf-8", "ignore").encode() + ELLIPSIS.encode()
    return data


def find_last_overwrite(text: str) -> str:
    """What a terminal shows of a line that returns to its beginning, roughly: what was written last."""
    for part in reversed(text.split("\r")):
        if part.strip():
            return part
    return ""


def apply_backspaces(text: str) -> str:
    shown: list[str] = []
    for character in text:
        if character != "\b":
            shown.append(character)
        elif shown:
            shown.pop()
    return "".join(shown)
