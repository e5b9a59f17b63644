"""Whether QEMU runs its guest, asked of a monitor that says what it likes."""

from __future__ import annotations

from vmsilod.first_sign import count_answers


def test_only_answers_count() -> None:
    lines = [b'{"QMP": {}}', b'{"return": {}}', b'{"event": "RESUME"}', b'{"return": {"status": "running"}}']
    assert count_answers(lines) == 2


def test_a_hostile_monitor_is_read_once() -> None:
    assert count_answers([b"[" * 5000, b"1", b"null", b"\xff", b'{"return"', b""]) == 0
