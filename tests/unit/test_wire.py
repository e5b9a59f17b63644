from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import vmsilo_wire as wire
from vmsilo_wire import payload
from vmsilo_wire.payload import Spawn, encode_hello, encode_spawn, parse_hello, parse_spawn

GUEST = Path(wire.__file__).parent.parent
SECRET = "ab" * 32


def spawn_payload(**changes: object) -> bytes:
    body: dict[str, object] = {"argv": ["true"], "cwd": None, "env": {}, "pty": None, "detach": False}
    return json.dumps(body | changes).encode()


def test_frames_are_found_whatever_the_pieces() -> None:
    frames = [
        (wire.PING, b"x"),
        (wire.STDIN, bytes(range(256)) * 1024),
        (wire.STDIN, b""),
        (wire.SIGNAL, b"\x02"),
    ]
    stream = b"".join(wire.encode_frame(*frame) for frame in frames)
    for step in (1, 7, 4096, len(stream)):
        decoder = wire.Decoder(wire.TO_AGENT)
        found = []
        for start in range(0, len(stream), step):
            found += decoder.feed(stream[start : start + step])
        assert found == frames
        assert decoder.pending == 0


def test_half_a_frame_is_pending() -> None:
    decoder = wire.Decoder(wire.TO_AGENT)
    assert decoder.feed(wire.encode_frame(wire.PING, b"abc")[:-1]) == []
    assert decoder.pending == 7


@pytest.mark.parametrize(
    "header",
    [
        b"\x00\x00\x00\x00\x00",
        b"\x11\x00\x00\x00\x00",  # STDOUT towards the agent
        b"\x03\x00\x04\x00\x01",  # STDIN of 256 KiB and one byte
        b"\x03\xff\xff\xff\xff",
        b"\x02\x00\x10\x00\x01",
        b"\x05\x00\x00\x00\x02",  # SIGNAL has one byte
        b"\x06\x00\x00\x00\x01",  # POWEROFF has none
        b"GET / HTTP/1.1\r\n",
    ],
)
def test_bad_header_is_refused_before_its_payload_and_for_ever(header: bytes) -> None:
    decoder = wire.Decoder(wire.TO_AGENT)
    with pytest.raises(wire.ProtocolError):
        decoder.feed(header)
    with pytest.raises(wire.ProtocolError):
        decoder.feed(wire.encode_frame(wire.PING))


def test_first_frame_must_be_the_expected_one() -> None:
    decoder = wire.Decoder(wire.TO_AGENT, first=wire.HELLO)
    with pytest.raises(wire.ProtocolError):
        decoder.feed(wire.encode_frame(wire.PING))
    decoder = wire.Decoder(wire.TO_AGENT, first=wire.HELLO)
    assert len(decoder.feed(encode_hello("user", SECRET) + wire.encode_frame(wire.PING))) == 2


@pytest.mark.parametrize(
    ("kind", "size"), [(wire.STDIN, wire.DATA_MAX + 1), (wire.PING, 65), (wire.SIGNAL, 0)]
)
def test_sender_refuses_what_the_receiver_would(kind: int, size: int) -> None:
    with pytest.raises(ValueError, match="cannot carry"):
        wire.encode_frame(kind, bytes(size))


def test_spawn_survives_the_way_byte_for_byte() -> None:
    odd = 'é "\\\n\x7f' + payload.from_bytes(b"\xff\xfe") + "\U0001f600"
    frame = encode_spawn(Spawn((odd, ""), cwd=odd, env={"A_1": odd}, pty=(24, 80)))
    (found,) = wire.Decoder(wire.TO_AGENT).feed(frame)
    spawn = parse_spawn(found[1])
    assert spawn.argv == (odd, "")
    assert spawn.cwd == odd
    assert spawn.env == {"A_1": odd}
    assert spawn.pty == (24, 80)
    assert spawn.detach is False
    assert payload.to_bytes(spawn.argv[0]).count(b"\xff\xfe") == 1
    assert json.loads(found[1])["argv"][0] == odd


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"[]",
        b"{",
        b"{} {}",
        b"\xff\xff",
        b"[" * 60000,
        b'{"argv":[' + b"1" * 5000 + b"]}",
        spawn_payload(argv=[]),
        spawn_payload(argv="true"),
        spawn_payload(argv=["a\0b"]),
        spawn_payload(argv=["\ud800"]),
        spawn_payload(argv=[""]),
        spawn_payload(argv=["true", 1]),
        spawn_payload(argv=["x"] * 5000),
        spawn_payload(cwd=7),
        spawn_payload(env=[]),
        spawn_payload(env={"A": 1}),
        spawn_payload(env={"A": "\0"}),
        spawn_payload(pty={"rows": 24}),
        spawn_payload(pty={"rows": -1, "cols": 80}),
        spawn_payload(pty={"rows": True, "cols": 80}),
        spawn_payload(pty={"rows": 24.0, "cols": 80}),
        spawn_payload(detach=1),
        spawn_payload(detach=True, pty={"rows": 24, "cols": 80}),
        spawn_payload(surprise=1),
    ],
)
def test_bad_spawn_is_a_protocol_error(bad: bytes) -> None:
    with pytest.raises(wire.ProtocolError):
        parse_spawn(bad)


def test_environment_names_no_shell_would_export_are_dropped() -> None:
    env = {
        "GOOD": "1",
        "_x9": "2",
        "9BAD": "3",
        "A B": "4",
        "": "5",
        "A=B": "6",
        "É": "7",
        "BASH_FUNC_x%%": "8",
    }
    assert parse_spawn(spawn_payload(env=env)).env == {"GOOD": "1", "_x9": "2"}


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"v": True},
        {"role": "admin"},
        {"role": []},
        {"secret": "ab"},
        {"secret": "G" * 64},
        {"secret": None},
    ],
)
def test_bad_hello(changes: dict[str, object]) -> None:
    good = {"v": 1, "role": "user", "secret": SECRET}
    assert parse_hello(json.dumps(good).encode()).secret == SECRET
    with pytest.raises(wire.ProtocolError):
        parse_hello(json.dumps(good | changes).encode())


@pytest.mark.parametrize("status", [0, 255, -9, -1])
def test_exit_keeps_code_and_signal_apart(status: int) -> None:
    ((kind, found),) = wire.Decoder(wire.TO_CLIENT).feed(payload.encode_exit(status))
    assert (kind, payload.parse_exit(found)) == (wire.EXIT, status)


@pytest.mark.parametrize("bad", [b"{}", b'{"code":256}', b'{"code":"0"}', b'{"signal":0}', b'{"code":true}'])
def test_bad_exit(bad: bytes) -> None:
    with pytest.raises(wire.ProtocolError):
        payload.parse_exit(bad)


def test_bad_error() -> None:
    with pytest.raises(wire.ProtocolError):
        payload.parse_error(b'{"code":"surprise","message":""}')


def test_only_harmless_signals_pass() -> None:
    assert wire.parse_signal(b"\x0f") == 15
    for number in (0, 9, 19, 255):
        with pytest.raises(wire.ProtocolError):
            wire.parse_signal(bytes((number,)))


def test_console_size_is_clamped_when_sent_and_checked_when_read() -> None:
    for given, sent in (((24, 80), (24, 80)), ((0, -1), (1, 1)), ((70000, 1001), (1000, 1000))):
        ((kind, found),) = wire.Decoder(wire.TO_AGENT).feed(wire.encode_console_size(*given))
        assert (kind, wire.parse_console_size(found)) == (wire.CONSOLE_SIZE, sent)


@pytest.mark.parametrize(
    "bad", [b"", b"\0\x18\0", b"\0\x18\0P!", b"\0\0\0P", b"\0\x18\0\0", b"\0\x18\x03\xe9"]
)
def test_bad_console_size(bad: bytes) -> None:
    with pytest.raises(wire.ProtocolError):
        wire.parse_console_size(bad)


def test_import_stays_small_for_the_client() -> None:
    """The client is measured by its start-up; it needs none of these to send and read frames."""
    code = (
        f"import sys; sys.path.insert(0, {str(GUEST)!r}); import vmsilo_wire.payload; "
        "print(*sys.modules.keys() & {'re', 'json', 'typing', 'dataclasses', 'enum', 'collections'})"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
