"""A line of a hostile guest as text for the journal."""

from __future__ import annotations

import random

import pytest
from vmsilo_console.plaintext import RAW_MAX, TEXT_MAX, clean_line


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"plain text", "plain text"),
        (b"  both ends \t", "both ends"),
        (b"a\tb", "a b"),
        ("Grüße ✓".encode(), "Grüße ✓"),
        (b"\x1b[1;31mred\x1b[0m and \x1b[38:2::1:2:3mmore\x1b[m", "red and more"),
        (b"\x1b[?25l\x1b[2J\x1b[1;1Htop", "top"),
        (b"\x1b[>0qx\x1b[!py\x1b[ qz", "xyz"),
        (b"\x1b]0;title\x07text", "text"),
        (b"\x1b]52;c;ZXZpbA==\x1b\\text", "text"),
        (b"\x1bP1$r0m\x1b\\text", "text"),
        (b"\x1b_apc\x1b\\a\x1b^pm\x1b\\b\x1bXsos\x1b\\c", "abc"),
        ("\u009d0;title\u009ctext".encode(), "text"),
        ("\u009b31mred".encode(), "red"),
        ("a\u0085b\u2028c\u2029d".encode(), "abcd"),
        ("safe\u202egnp.exe\u2066x".encode(), "safegnp.exex"),
        (b"\x1b]0;never ended", ""),
        (b"before\x1b[3", "before"),
        (b"end\x1b", "end"),
        (b"\x1b\x1b[0m[31mtext", "[31mtext"),
        (b"\x1b(B\x1b)0\x1b=\x1b>\x1bMtext\x1b#8", "text"),
        (b"a\x00b\x01c\x07d\x7fe", "abcde"),
        (b"12%\r50%\r100%\r\n"[:-1], "100%"),
        (b"abc\b\bX", "aX"),
        (b"\b\b\bx", "x"),
        (b"bad \xff\xfe bytes \x9b31m", "bad \\xff\\xfe bytes \\x9b31m"),
        (b"\xc3", "\\xc3"),
        (b"\xed\xa0\x80", "\\xed\\xa0\\x80"),
        (b"<0>fake", "<0>fake"),
        (b"\x1b[m \r \x1b[K", ""),
    ],
)
def test_what_is_left_of_a_line(line: bytes, text: str) -> None:
    assert clean_line(line) == text.encode()


def test_a_long_line_is_cut_between_characters() -> None:
    text = clean_line(("ü" * 3000).encode())
    assert TEXT_MAX - 2 <= len(text) <= TEXT_MAX
    assert text.decode().rstrip("…") == "ü" * (len(text.decode()) - 1)
    assert clean_line(b"x" * TEXT_MAX) == b"x" * TEXT_MAX


def test_random_bytes_leave_only_printable_text() -> None:
    source = random.Random(7)
    pieces = [b"\x1b", b"[", b"]", b"\\", b"\x9b", b"\xc2\x9b", b"\xc2\x9d", b"P", b"\r", b"\b", b"m"]
    for _ in range(3000):
        line = b"".join(
            source.choice(pieces) if source.random() < 0.7 else source.randbytes(2) for _ in range(60)
        ).replace(b"\n", b"")
        text = clean_line(line)
        assert len(text) <= TEXT_MAX
        assert all(ord(c) >= 0x20 and not 0x7F <= ord(c) <= 0x9F for c in text.decode()), (line, text)


@pytest.mark.parametrize("unit", [b"\x1b[", b"\x1b]", b"\xc2\x9b;", b"\x1b[0;", b"\b", b"\r", b"\x1b "])
def test_hostile_lines_are_cheap(unit: bytes) -> None:
    import time

    line = unit * (RAW_MAX // len(unit))
    begin = time.process_time()
    clean_line(line)
    assert time.process_time() - begin < 0.5  # quadratic work would take longer by far
