"""What vmsilo-consoled does when vmsilod says the same again, or that a VM has another owner."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from console_host import ConsoleHost, run_host
from relay_host import Control, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def host(tmp_path: Path) -> Iterator[ConsoleHost]:
    with run_host(tmp_path) as host:
        yield host


@pytest.fixture
def control(host: ConsoleHost) -> Control:
    control = host.start()
    host.listen(control)
    return control


def read_history(host: ConsoleHost) -> bytes:
    client = host.client()
    client.expect("S")
    client.expect("H")
    client.sock.close()
    return client.output


def test_a_new_owner_is_not_shown_what_ran_for_the_one_before(host: ConsoleHost, control: Control) -> None:
    host.open(control).write(b"secret\n")
    wait_until(lambda: read_history(host) == b"secret\n", "the output")
    host.listen(control)  # again, for the same
    assert read_history(host) == b"secret\n"
    assert control.call("close", name="banking", generation="g1") == {"ok": True}
    host.listen(control, owner=1001)
    assert read_history(host) == b""
    host.kill()
    control = host.start()
    assert read_history(host) == b""


def test_of_an_animation_the_journal_has_a_line_now_and_then(host: ConsoleHost, control: Control) -> None:
    journal = host.journal()
    terminal = host.open(control, journal=journal)
    terminal.write(b"[  OK  ] Started a.\n")
    for stars in (b"[*     ]", b"[**    ]", b"[ *** *]"):
        terminal.write(b"\r\x1b[K" + stars + b" (1 of 2) Job b.service/start running (5s / 1min)\n")
    terminal.write(b"[FAILED] Failed to start b.\n")
    assert [line.partition(b": ")[2] for line in journal.lines(3)] == [
        b"[  OK  ] Started a.",
        b"[*     ] (1 of 2) Job b.service/start running (5s / 1min)",
        b"[FAILED] Failed to start b.",
    ]


def test_same_run_again_with_the_same_journal_goes_on_with_it(host: ConsoleHost, control: Control) -> None:
    """vmsilod died before it answered, and the launcher has passed everything anew."""
    journal = host.journal()
    host.open(control, journal=journal).write(b"one\n")
    assert journal.lines(1) == [b"<6>console: one"]
    host.open(control, journal=journal).write(b"two\n")
    assert journal.lines(1) == [b"<6>console: two"]
