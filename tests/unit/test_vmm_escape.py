"""Quoting, proved by reading the result back with the other side's grammar."""

from __future__ import annotations

import random

import pytest
from vmsilod.vmm.errors import BadOptionValue
from vmsilod.vmm.escape import check_argument, quote_crosvm, quote_qemu

ALPHABET = "aZ09 ,=:;\"'\\[]{}()$`/.-+%@ä€\U0001f600"


def random_values(count: int = 2000) -> list[str]:
    source = random.Random(7)
    return ["".join(source.choices(ALPHABET, k=source.randint(1, 24))) for _ in range(count)]


def read_crosvm_pairs(text: str) -> list[tuple[str, str]]:
    """serde_keyvalue's grammar for flat strings (crosvm.md 1.2)."""
    pairs, at = [], 0
    while at < len(text):
        end = text.index("=", at)
        key, at = text[at:end], end + 1
        value = ""
        if text[at] == '"':
            at += 1
            while text[at] != '"':
                at += text[at] == "\\"
                value += text[at]
                at += 1
            at += 1
        else:
            while at < len(text) and text[at] != ",":
                assert text[at] not in "\"'[]"
                value += text[at]
                at += 1
        pairs.append((key, value))
        assert at == len(text) or text[at] == ","
        at += 1
    return pairs


def read_qemu_pairs(text: str) -> list[tuple[str, str]]:
    """QemuOpts: `,,` is a comma (get_opt_value in util/qemu-option.c)."""
    parts = text.replace(",,", "\0").split(",")
    return [(key, value.replace("\0", ",")) for key, _, value in (part.partition("=") for part in parts)]


def test_crosvm_value_comes_back_and_ends_where_it_should() -> None:
    for value in random_values():
        text = f"a={quote_crosvm(value)},ro=true"
        assert read_crosvm_pairs(text) == [("a", value), ("ro", "true")]


def test_qemu_value_comes_back_and_ends_where_it_should() -> None:
    for value in random_values():
        text = f"a={quote_qemu(value)},b=on"
        # A comma at the end meets the separator: `a=x,,,b=on` is read from the left.
        assert read_qemu_pairs(text) == [("a", value), ("b", "on")]


def test_ordinary_path_stays_readable() -> None:
    path = "/run/vmsilo/vm/banking/vsock/vhost"
    assert quote_crosvm(path) == path
    assert quote_qemu(path) == path


@pytest.mark.parametrize("value", ["123", "true", "falsehood", "0x10", "-1"])
def test_what_crosvm_would_guess_a_type_for_is_quoted(value: str) -> None:
    assert quote_crosvm(value) == f'"{value}"'


@pytest.mark.parametrize("value", ["", "a\0b", "a\nb", "a\x1bb", "a\x7fb", "a\x85b", "a\udcffb"])
def test_what_no_quoting_can_carry_is_refused(value: str) -> None:
    for quote in (quote_crosvm, quote_qemu, check_argument):
        with pytest.raises(BadOptionValue) as caught:
            quote(value)
        assert isinstance(caught.value, ValueError)
        assert caught.value.message


def test_value_that_looks_like_an_option_is_refused() -> None:
    with pytest.raises(BadOptionValue):
        check_argument("--mem=1")
    assert check_argument("a-b") == "a-b"
