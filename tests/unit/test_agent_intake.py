"""The agent's side of the wire: input in pieces, everything else whole, limits before bytes."""

from __future__ import annotations

import pytest
from vmsilo_agent.intake import Intake
from vmsilo_wire import DATA_MAX, HELLO, PING, POWEROFF, SPAWN, STDIN, ProtocolError, encode_frame

GREETING = encode_frame(HELLO, b"{}")


def feed(intake: Intake, data: bytes, size: int) -> list[tuple[int, bytes]]:
    found = []
    for at in range(0, len(data), size):
        found += [(kind, bytes(part)) for kind, part in intake.feed(memoryview(data)[at : at + size])]
    return found


@pytest.mark.parametrize("size", [1, 2, 5, 7, 4096])
def test_frames_in_any_pieces(size: int) -> None:
    sent = GREETING + encode_frame(SPAWN, b'{"argv":[]}') + encode_frame(STDIN, b"some input")
    sent += encode_frame(PING, b"ping") + encode_frame(STDIN) + encode_frame(POWEROFF)
    intake = Intake()
    found = feed(intake, sent, size)
    assert [frame for frame in found if frame[0] != STDIN] == [
        (HELLO, b"{}"),
        (SPAWN, b'{"argv":[]}'),
        (PING, b"ping"),
        (POWEROFF, b""),
    ]
    pieces = [part for kind, part in found if kind == STDIN]
    assert b"".join(pieces) == b"some input"
    assert [part for part in pieces if not part] == [b""], "an empty piece is the end of the input"
    assert pieces[-1] == b""
    assert intake.between_frames


def test_input_is_passed_on_before_its_frame_is_whole() -> None:
    intake = Intake()
    frame = encode_frame(STDIN, bytes(DATA_MAX))
    assert feed(intake, GREETING + frame[:100], 4096)[1:] == [(STDIN, bytes(95))]
    assert not intake.between_frames
    assert sum(len(part) for _kind, part in feed(intake, frame[100:], 65536)) == DATA_MAX - 95
    assert intake.between_frames


@pytest.mark.parametrize(
    "data",
    [
        encode_frame(STDIN, b"x"),
        encode_frame(PING),
        bytes([HELLO]) + (1 << 20).to_bytes(4, "big"),
        GREETING + bytes([STDIN]) + (DATA_MAX + 1).to_bytes(4, "big"),
        GREETING + bytes([99, 0, 0, 0, 0]),
        GREETING + bytes([POWEROFF, 0, 0, 0, 1]),
    ],
)
def test_a_bad_header_is_refused_without_its_payload(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        feed(Intake(), data, 4096)
