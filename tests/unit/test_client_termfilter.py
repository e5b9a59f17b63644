"""What may reach a terminal, and that cutting the stream changes nothing."""

import random

import pytest
from vmsilo.errors import printable
from vmsilo.termfilter import SGR_MAX, STRING_MAX, TerminalFilter


def filtered(data: bytes) -> bytes:
    one = TerminalFilter()
    return one.feed(data) + one.feed(b"", final=True)


@pytest.mark.parametrize(
    "data",
    [
        b"plain\r\n\ttext\b\a",
        "Grüße, 漢字, \N{PILE OF POO}".encode(),
        b"\x1b[31mred\x1b[0m",
        b"\x1b[m",
        b"\x1b[38;2;1;2;3;48:5:7m",
        "שלום \u200f".encode(),
    ],
)
def test_passes(data: bytes) -> None:
    assert filtered(data) == data


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"a\x00b\x0b\x0c\x0e\x0f\x7fc", b"abc"),
        (b"a\x1b]0;title\x07b", b"ab"),
        (b"a\x1b]52;c;aGk=\x1b\\b", b"ab"),
        (b"a\x1bPq#0\x1b\\b", b"ab"),
        (b"a\x1b_apc\x1b\\b\x1b^pm\x1b\\c\x1bXsos\x1b\\d", b"abcd"),
        (b"a\x1b[2J\x1b[10;10Hb\x1b[6n", b"ab"),
        (b"a\x1b[?1049hb\x1b[>c", b"ab"),
        (b"a\x1b[?31mb\x1b[1 mc\x1b[>4;2md", b"abcd"),
        (b"a\x1bcb\x1b7\x1b(0c\x1b#8d", b"abcd"),
        ("a\x9b31mb\x9d0;t\x9cc\x90x\x9cd\x85e".encode(), b"abcde"),
        ("a\u202eb\u2066c\u2069\u202ad".encode(), b"abcd"),
        (b"a\xffb\xc3", b"a\xef\xbf\xbdb\xef\xbf\xbd"),
        (b"\x9b31ma", b"\xef\xbf\xbd31ma"),
        (b"a\x1b[31\nmb", b"a\nmb"),
        (b"a\x1b[31\x1b[32mb", b"a\x1b[32mb"),
        (b"a\x1b]0;x\x1b[31mb", b"a\x1b[31mb"),
        (b"a\x1b]0;x\x18b", b"ab"),
        (b"a\x1b\x1b\x1b[31mb", b"a\x1b[31mb"),
        (b"a\x1b[" + b"1;" * SGR_MAX + b"mb", b"ab"),
        (b"a\x1b[3", b"a"),
        (b"a\x1b", b"a"),
        ("a\x1b[3\N{SNOWMAN}mb".encode(), "a\N{SNOWMAN}mb".encode()),
    ],
)
def test_removes(data: bytes, shown: bytes) -> None:
    assert filtered(data) == shown


def test_unterminated_string_is_bounded() -> None:
    shown = filtered(b"\x1b]0;" + b"x" * (STRING_MAX * 3) + b"end")
    assert shown.endswith(b"end")
    assert len(shown) <= STRING_MAX * 2 + 8


def test_held_sequence_is_bounded() -> None:
    one = TerminalFilter()
    for _ in range(100):
        assert len(one.feed(b"\x1b[" + b"0" * 60000)) <= 60000
        assert len(one._held) <= SGR_MAX + 1


ALPHABET = [
    b"a", b"m", b"\n", b"\x1b", b"[", b"]", b"P", b"\\", b"\x07", b";", b"31", b"?", b" ", b"(", b"\x18",
    b"\x00", b"\xc2\x9b", b"\xc2\x9c", b"\xc2\x9d", b"\xe2\x80\xae", b"\xe2\x81\xa6", b"\xff", b"\xc3",
    b"\xf0\x9f\x92\xa9", b"\xf0\x9f", b"\xed\xa0", b"\x9b", b"\x7f",
]  # fmt: skip


def assert_harmless(shown: bytes) -> None:
    """By other means than the filter's: every ESC starts a whole colour sequence, no control is left."""
    text = shown.decode()
    at = 0
    while at < len(text):
        c = text[at]
        if c == "\x1b":
            end = text.index("m", at)
            assert text[at + 1] == "["
            assert not text[at + 2 : end].strip("0123456789;:")
            at = end
        else:
            assert c in "\n\r\t\b\a" or " " <= c <= "~" or c > "\x9f"
            assert c not in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
        at += 1


@pytest.mark.parametrize("seed", range(60))
def test_any_cut_gives_the_same(seed: int) -> None:
    rng = random.Random(seed)
    data = b"".join(rng.choice(ALPHABET) for _ in range(rng.randrange(1, 400)))
    if seed % 3 == 0:
        data = rng.randbytes(500)
    whole = filtered(data)
    assert_harmless(whole)
    for _ in range(10):
        one = TerminalFilter()
        shown, at = b"", 0
        while at < len(data):
            size = rng.choice((1, 1, 2, 3, 7, 50))
            piece = one.feed(data[at : at + size])
            assert_harmless(shown + piece)
            shown += piece
            at += size
        assert shown + one.feed(b"", final=True) == whole


def test_colour_is_reset_only_if_left_on() -> None:
    one = TerminalFilter()
    one.feed(b"\x1b[31mred")
    assert one.reset() == b"\x1b[0m"
    one.feed(b"\x1b[0m")
    assert one.reset() == b""


def test_printable_is_one_line_without_controls() -> None:
    assert printable("a\x1b[31mb\nc\u202ed\udc80") == "a [31mb c\ufffdd\ufffd"
    assert printable("x" * 50, 10) == "x" * 10 + "..."
