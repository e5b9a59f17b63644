"""JSON payloads of frames: encoding, and strict parsing of what an untrusted peer sent.

Called by agent, relay and client.  Strings carry non-UTF-8 bytes as lone surrogates U+DC80..U+DCFF
(Python's surrogateescape), written as \\udcXX.  Parsing raises ProtocolError, never anything else.  Free
functions and two value classes whose attributes are never changed after construction; no state.

`json` costs several milliseconds to import because of `re`, so CPython's own accelerator is used directly
where it behaves as it does in CPython 3.11, and `json` where it does not.
"""

from vmsilo_wire.frames import (
    CONTROL_MAX,
    ERROR,
    ERROR_CODES,
    EXIT,
    HELLO,
    ROLES,
    SPAWN,
    STARTED,
    VERSION,
    ProtocolError,
    encode_frame,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

ARGV_MAX = 4096
ENV_MAX = 4096
_NAME_FIRST = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_")
_NAME_REST = _NAME_FIRST | frozenset("0123456789")
_HEX = frozenset("0123456789abcdef")


class _Strict:
    """What the scanner of CPython's accelerator asks its context for."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float
    memo: dict[str, str] = {}  # noqa: RUF012 - the scanner wants the attribute, and clears it after each call


def _find_codec() -> "tuple[Callable[[str], str], Callable[[str], object]]":
    """(quote, load)"""
    try:
        import _json

        quote = _json.encode_basestring_ascii
        scan = _json.make_scanner(_Strict)  # type: ignore[arg-type] # typeshed wants the scanner itself
        if quote('a"\udc80') == '"a\\"\\udc80"' and scan('{"a": [1, true]}', 0) == ({"a": [1, True]}, 16):

            def load(text: str) -> object:
                value, end = scan(text, 0)
                if end != len(text):
                    raise ValueError("bytes after the value")
                return value

            return quote, load
    except (ImportError, AttributeError, TypeError, ValueError, StopIteration):
        pass  # a private module may change; json has the same functions
    import json

    return json.encoder.encode_basestring_ascii, json.loads


_quote, _load = _find_codec()


def dump_json(value: object) -> bytes:
    """Compact ASCII JSON of dict (string keys), list, tuple, str, int, bool and None."""
    return _dump(value).encode("ascii")


def _dump(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{_quote(key)}:{_dump(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_dump, value)) + "]"
    raise TypeError(f"{type(value).__name__} is not JSON")


def load_json(untrusted_payload: bytes) -> dict[str, object]:
    """The object in a payload or packet; ProtocolError where it is anything else."""
    try:
        value = _load(untrusted_payload.decode("utf-8").strip(" \t\r\n"))
    except (ValueError, StopIteration, RecursionError) as exc:
        raise ProtocolError("not JSON") from exc
    if not isinstance(value, dict):
        raise ProtocolError("not a JSON object")
    return value


def to_bytes(text: str) -> bytes:
    """The bytes a checked protocol string stands for."""
    return text.encode("utf-8", "surrogateescape")


def from_bytes(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


class Hello:
    __slots__ = ("role", "secret")

    def __init__(self, role: str, secret: str) -> None:
        self.role = role
        self.secret = secret


class Spawn:
    """A command to run.  `pty` is (rows, cols) or None; `cwd` None is the home directory."""

    __slots__ = ("argv", "cwd", "detach", "env", "pty")

    def __init__(
        self,
        argv: tuple[str, ...],
        *,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        pty: tuple[int, int] | None = None,
        detach: bool = False,
    ) -> None:
        self.argv = argv
        self.cwd = cwd
        self.env = {} if env is None else env
        self.pty = pty
        self.detach = detach


def encode_hello(role: str, secret: str) -> bytes:
    if role not in ROLES:
        raise ValueError(f"no role {role!r}")
    return encode_frame(HELLO, dump_json({"v": VERSION, "role": role, "secret": secret}))


def encode_spawn(spawn: Spawn) -> bytes:
    """ValueError where it is longer than CONTROL_MAX."""
    pty = None if spawn.pty is None else {"rows": spawn.pty[0], "cols": spawn.pty[1]}
    body = {"argv": spawn.argv, "cwd": spawn.cwd, "env": spawn.env, "pty": pty, "detach": spawn.detach}
    payload = dump_json(body)
    if len(payload) > CONTROL_MAX:
        raise ValueError("arguments and environment are too long")
    return encode_frame(SPAWN, payload)


def encode_started(pid: int) -> bytes:
    return encode_frame(STARTED, dump_json({"pid": pid}))


def encode_exit(status: int) -> bytes:
    """`status` as subprocess has it: an exit code, or minus the signal's number."""
    return encode_frame(EXIT, dump_json({"code": status} if status >= 0 else {"signal": -status}))


def encode_error(code: str, message: str) -> bytes:
    if code not in ERROR_CODES:
        raise ValueError(f"no error code {code!r}")
    return encode_frame(ERROR, dump_json({"code": code, "message": message[:4096]}))


def parse_hello(untrusted_payload: bytes) -> Hello:
    untrusted = load_json(untrusted_payload)
    version, role, secret = untrusted.get("v"), untrusted.get("role"), untrusted.get("secret")
    if version != VERSION or isinstance(version, bool):
        raise ProtocolError("protocol version not supported")
    if not isinstance(role, str) or role not in ROLES:
        raise ProtocolError("no such role")
    if not isinstance(secret, str) or len(secret) != 64 or not _HEX.issuperset(secret):
        raise ProtocolError("bad secret")
    return Hello(role, secret)


def parse_spawn(untrusted_payload: bytes) -> Spawn:
    """Keys beyond the known ones are refused, so that a newer client is told instead of half obeyed."""
    untrusted = load_json(untrusted_payload)
    unknown = untrusted.keys() - {"argv", "cwd", "env", "pty", "detach"}
    if unknown:
        raise ProtocolError("unknown key in SPAWN")
    argv = untrusted.get("argv")
    if not isinstance(argv, list) or not 1 <= len(argv) <= ARGV_MAX:
        raise ProtocolError("argv is not a list with a command")
    checked = tuple(_check_text("argv", item) for item in argv)
    if not checked[0]:
        raise ProtocolError("the command is empty")
    cwd = untrusted.get("cwd")
    detach = untrusted.get("detach", False)
    if not isinstance(detach, bool):
        raise ProtocolError("detach is not a boolean")
    pty = _check_pty(untrusted.get("pty"))
    if pty is not None and detach:
        raise ProtocolError("a detached command has no terminal")
    return Spawn(
        checked,
        cwd=None if cwd is None else _check_text("cwd", cwd),
        env=_check_env(untrusted.get("env", {})),
        pty=pty,
        detach=detach,
    )


def parse_started(untrusted_payload: bytes) -> int:
    return _check_int("pid", load_json(untrusted_payload).get("pid"), 1, 0x7FFFFFFF)


def parse_exit(untrusted_payload: bytes) -> int:
    """As encode_exit takes it."""
    untrusted = load_json(untrusted_payload)
    if "signal" in untrusted:
        return -_check_int("signal", untrusted["signal"], 1, 64)
    return _check_int("code", untrusted.get("code"), 0, 255)


def parse_error(untrusted_payload: bytes) -> tuple[str, str]:
    """(code, message); the message is any text and has to be filtered before a terminal sees it."""
    untrusted = load_json(untrusted_payload)
    code, message = untrusted.get("code"), untrusted.get("message")
    if not isinstance(code, str) or code not in ERROR_CODES or not isinstance(message, str):
        raise ProtocolError("bad ERROR")
    return code, message


def is_env_name(name: str) -> bool:
    return bool(name) and name[0] in _NAME_FIRST and _NAME_REST.issuperset(name)


def _check_text(what: str, untrusted: object) -> str:
    if not isinstance(untrusted, str) or "\0" in untrusted:
        raise ProtocolError(f"{what}: not a string without NUL")
    try:
        to_bytes(untrusted)
    except UnicodeEncodeError as exc:
        raise ProtocolError(f"{what}: lone surrogate") from exc
    return untrusted


def _check_int(what: str, untrusted: object, least: int, most: int) -> int:
    if not isinstance(untrusted, int) or isinstance(untrusted, bool) or not least <= untrusted <= most:
        raise ProtocolError(f"{what} is not a number from {least} to {most}")
    return untrusted


def _check_pty(untrusted: object) -> tuple[int, int] | None:
    if untrusted is None:
        return None
    if not isinstance(untrusted, dict):
        raise ProtocolError("pty is not an object")
    rows = _check_int("rows", untrusted.get("rows"), 0, 0xFFFF)
    return rows, _check_int("cols", untrusted.get("cols"), 0, 0xFFFF)


def _check_env(untrusted: object) -> dict[str, str]:
    """Refuses the request for a bad value; drops a variable whose name no shell could have exported."""
    if not isinstance(untrusted, dict) or len(untrusted) > ENV_MAX:
        raise ProtocolError("env is not an object")
    return {name: _check_text("env", value) for name, value in untrusted.items() if is_env_name(name)}
