"""Names, paths, options and commands as callers send them, and the rule file; all without a bus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vmsilod.bus.names import check_name, vm_path
from vmsilod.bus.requests import describe_command, parse_run, parse_stop_timeout
from vmsilod.bus.rules import TEMPLATE, remove_rules, render_rules, write_rules
from vmsilod.errors import WIRE, BadRequest, Failed, VmsiloError, wire_of

TREE = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("banking", "banking"),
        ("my-work", "my_2dwork"),
        ("7zip", "_37zip"),
        ("a.b_c", "a_2eb_5fc"),
        ("A1", "A1"),
    ],
)
def test_paths_are_escaped_as_systemd_does_it(name: str, label: str) -> None:
    assert vm_path(name) == f"/org/vmsilo1/vm/{label}"


@pytest.mark.parametrize("name", ["", "-a", ".a", "_a", "a/b", "a b", "a\n", "é", "a\0", "x" * 64])
def test_names_of_other_letters_are_refused(name: str) -> None:
    with pytest.raises(BadRequest):
        check_name(name)


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        ([], {}),
        ([""], {}),
        (["a\0b"], {}),
        (["a"], {"cwd": "/\0"}),
        (["a"], {"cwd": 3}),
        (["a"], {"root": 1}),
        (["a"], {"rows": True, "cols": 1}),
        (["a"], {"rows": 70_000, "cols": 1}),
        (["a"], {"cols": 1}),
        (["a"], {"env": {1: "b"}}),
        (["a"], {"env": {"": "b"}}),
        (["a"], {"env": {"A": "x" * (512 * 1024)}}),
        (["a"], {"shell": True}),
    ],
)
def test_broken_commands_are_refused(argv: list[str], options: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        parse_run("banking", 1000, argv, options)


def test_the_largest_command_is_512_kib() -> None:
    most = "x" * (512 * 1024 - 1)
    assert parse_run("banking", 1000, [most], {}).argv == (most,)
    with pytest.raises(BadRequest):
        parse_run("banking", 1000, [most, ""], {})


def test_a_stop_timeout_has_a_limit() -> None:
    assert parse_stop_timeout({}) is None
    assert parse_stop_timeout({"timeout": 0}) == 0
    with pytest.raises(BadRequest):
        parse_stop_timeout({"timeout": 3601})


def test_a_command_is_shown_on_one_short_printable_line() -> None:
    assert describe_command(["ls", "-l", "a b"]) == "ls -l 'a b'"
    assert describe_command(["a\nb\x1b[2J\u202e"]) == "'a?b?[2J?'"
    assert len(describe_command(["x" * 100] * 1000)) == 200


@pytest.mark.parametrize("user", ["alice", 'a"b', "a\\", "a\n//", "é\u2028"])
def test_a_user_name_stays_a_string_in_the_rule(user: str) -> None:
    (line,) = [line for line in render_rules(user).splitlines() if "subject.user" in line]
    before, after = "    if (subject.user !== ", ") {"
    assert line.startswith(before)
    assert line.endswith(after)
    assert line.isascii()
    assert json.loads(line[len(before) : -len(after)]) == user


def test_the_rule_in_the_tree_is_the_one_that_is_written() -> None:
    assert (TREE / "polkit/50-vmsilo.rules.in").read_text() == TEMPLATE


def test_the_rule_file_is_written_only_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "50-vmsilo.rules"
    assert write_rules(render_rules("alice"), path)
    first = path.stat()
    assert first.st_mode & 0o777 == 0o644
    assert not write_rules(render_rules("alice"), path)
    assert path.stat().st_ino == first.st_ino
    assert write_rules(render_rules("bob"), path)
    assert "bob" in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    remove_rules(path)
    remove_rules(path)
    assert not path.exists()


def test_a_rule_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="cannot write"):
        write_rules("x", tmp_path / "missing" / "50-vmsilo.rules")


def test_errors_keep_their_code_on_the_way_through_a_peer() -> None:
    for kind in WIRE:
        error = VmsiloError.from_code(kind.default_code, "fact", "hint")
        assert type(error) is kind
        assert error.text == "fact\nhint"
    unknown = VmsiloError.from_code("agent-unreachable", "fact")
    assert unknown.code == "agent-unreachable"
    assert wire_of(unknown).dbus_name == "org.vmsilo1.Error.Failed"
