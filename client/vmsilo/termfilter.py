"""What a guest may write on the user's terminal: text, line controls and colours.

A guest is hostile. Escape sequences retitle and resize windows, redefine keys, write the clipboard and,
as answers to queries, type into the shell that runs next; bidirectional controls show another command
than the one that is there. Passed: printable text, newline, carriage return, tab, backspace, bell, and
`CSI digits : ; m`. Removed: every other control of C0 and C1 (also encoded as U+0080-9F), every other
sequence, the content of OSC, DCS, APC, PM and SOS strings, bidi embeddings, overrides and isolates.
Invalid UTF-8 becomes U+FFFD.

The terminal itself never sees the begin of a sequence without its end, so it can't be left in the midst
of one. An unterminated string is swallowed up to `STRING_MAX` characters, then text shows again. One
object per stream.
"""

import codecs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

STRING_MAX = 4096
SGR_MAX = 128
STRETCH = 4096  # characters searched at once, so that a stream of introducers costs linear time

TEXT, ESCAPE, ESCAPE_MORE, CSI, CSI_IGNORE, STRING, STRING_ESCAPE = range(7)

KEPT = frozenset("\n\r\t\b\a")


def _codes(*spans: tuple[int, int]) -> "Iterable[int]":
    for first, last in spans:
        yield from range(first, last + 1)


# Applied to stretches without an introducer: what is left of the controls there has no sequence after it.
REMOVED: dict[int, None] = {
    c: None
    for c in _codes((0x00, 0x1F), (0x7F, 0x9F), (0x202A, 0x202E), (0x2066, 0x2069))
    if chr(c) not in KEPT
}
STRINGS = frozenset("PX]^_")  # after ESC: DCS, SOS, OSC, PM, APC
C1_STRINGS = frozenset("\x90\x98\x9d\x9e\x9f")
INTRODUCERS = ("\x1b", "\x9b", *C1_STRINGS)
PARAMETERS = frozenset("0123456789;:")


class TerminalFilter:
    """`feed` gives the same whichever way the stream is cut into pieces."""

    __slots__ = ("_decoder", "_held", "_state", "_swallowed", "coloured")

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._state = TEXT
        self._held = ""
        self._swallowed = 0
        self.coloured = False

    def feed(self, untrusted_data: bytes | memoryview, *, final: bool = False) -> bytes:
        text = self._decoder.decode(bytes(untrusted_data), final)
        if self._state == TEXT and text.isascii() and "\x1b" not in text:
            return text.translate(REMOVED).encode()
        kept: list[str] = []
        at = 0
        while at < len(text):
            at = self._text(text, at, kept) if self._state == TEXT else self._sequence(text[at], at, kept)
        return "".join(kept).encode()

    def reset(self) -> bytes:
        """What brings the terminal's colours back after the last byte."""
        return b"\x1b[0m" if self.coloured else b""

    def _text(self, text: str, at: int, kept: list[str]) -> int:
        """Passes text up to the next introducer, and takes that."""
        most = end = min(len(text), at + STRETCH)
        for introducer in INTRODUCERS:
            found = text.find(introducer, at, end)
            if found >= 0:
                end = found
        kept.append(text[at:end].translate(REMOVED))
        if end == most:
            return end
        self._swallowed = 0
        self._held = ""
        c = text[end]
        self._state = ESCAPE if c == "\x1b" else CSI_IGNORE if c == "\x9b" else STRING
        return end + 1

    def _sequence(self, c: str, at: int, kept: list[str]) -> int:
        """One character within a sequence; returns where to go on."""
        self._swallowed += 1
        if self._state in (STRING, STRING_ESCAPE):
            return self._string(c, at)
        if c == "\x1b" or "\x80" <= c <= "\x9f" or c < " ":
            # A new sequence, or a control within this one: this is dropped, the control judged alone.
            self._state = TEXT
            return at
        if self._state in (ESCAPE, ESCAPE_MORE):
            self._state = self._after_escape(c)
            return at + 1
        return self._control_sequence(c, at, kept)

    def _after_escape(self, c: str) -> int:
        if self._state == ESCAPE:
            if c == "[":
                return CSI
            if c in STRINGS:
                return STRING
        if " " <= c <= "/" and self._swallowed < SGR_MAX:
            return ESCAPE_MORE
        return TEXT

    def _control_sequence(self, c: str, at: int, kept: list[str]) -> int:
        if "@" <= c <= "~":
            if c == "m" and self._state == CSI:
                kept.append(f"\x1b[{self._held}m")
                self.coloured = self._held.strip("0;") != ""
            self._state = TEXT
        elif c > "~" or self._swallowed > STRING_MAX:
            self._state = TEXT
            return at
        elif self._state == CSI:
            self._held += c
            if c not in PARAMETERS or len(self._held) > SGR_MAX:
                self._state = CSI_IGNORE
        return at + 1

    def _string(self, c: str, at: int) -> int:
        if self._state == STRING_ESCAPE and c != "\\":
            # ESC ends the string; what follows belongs to the sequence that it starts.
            self._state = ESCAPE
            self._swallowed = 0
            self._held = ""
            return at
        if c in "\a\x18\x1a\x9c\\" and (c != "\\" or self._state == STRING_ESCAPE):
            self._state = TEXT
        elif c == "\x1b":
            self._state = STRING_ESCAPE
        elif self._swallowed > STRING_MAX:
            self._state = TEXT
        return at + 1
