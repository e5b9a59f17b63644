"""What relayd must remember of one VM, its form on disk, and the check of both.

A Record comes from vmsilod by `add` or from the state directory after a restart; both pass the same check.
The state directory is relayd's own (0700) and survives it. Nothing here opens a socket.
"""

from __future__ import annotations

import errno
import json
import os
import re

from vmsilo_relay.packet import Refusal, check_keys, parse_object, take_int, take_str

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Protocol, TypeVar

    class Named(Protocol):
        @property
        def name(self) -> str: ...

    Kept = TypeVar("Kept", bound=Named)

NAME = re.compile(r"[a-z][a-z0-9-]{0,30}", re.ASCII)
SECRET = re.compile(r"[0-9a-f]{64}", re.ASCII)
GENERATION = re.compile(r"[\x21-\x7e]{1,128}", re.ASCII)
UID_MAX = 0xFFFFFFFE
CID_MIN, CID_MAX = 3, 0xFFFFFFFE  # vsock(7): 0..2 are hypervisor, local and host, the last is "any"
STATE_MAX = 16384
START_TIMEOUT = 180  # seconds; of a VM whose vmsilod or state file is older than the key
WAIT_MAX = 3600
FD_KINDS = ("command", "host-port")
ADD_KEYS = ("name", "generation", "secret", "owner", "channel", "fds")
OPTIONAL_KEYS = ("start_timeout",)
STATE_KEYS = (*ADD_KEYS, "agent", "ready", "status")


class KernelChannel:
    __slots__ = ("cid",)

    def __init__(self, cid: int) -> None:
        self.cid = cid

    def to_json(self) -> dict[str, object]:
        return {"type": "kernel", "cid": self.cid}


class HybridChannel:
    __slots__ = ("path", "uid")

    def __init__(self, path: str, uid: int) -> None:
        self.path = path
        self.uid = uid

    def to_json(self) -> dict[str, object]:
        return {"type": "hybrid", "path": self.path, "uid": self.uid}


Channel = KernelChannel | HybridChannel


class Record:
    """One VM of one generation. `agent`, `ready` and `status` change with what its guest says.

    `start_timeout`: seconds that a client waits for it that does not say how long.
    """

    __slots__ = (
        *("agent", "channel", "fds", "generation", "name", "owner", "ready", "secret"),
        *("start_timeout", "status"),
    )

    def __init__(self, name: str, generation: str, secret: str, owner: int, channel: Channel) -> None:
        self.name = name
        self.generation = generation
        self.secret = secret
        self.owner = owner
        self.channel = channel
        self.start_timeout = START_TIMEOUT
        self.fds: tuple[str, ...] = ()
        self.agent = False
        self.ready = False
        self.status = ""

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "generation": self.generation,
            "secret": self.secret,
            "owner": self.owner,
            "channel": self.channel.to_json(),
            "start_timeout": self.start_timeout,
            "fds": list(self.fds),
            "agent": self.agent,
            "ready": self.ready,
            "status": self.status,
        }


def check_name(untrusted_name: str) -> str:
    if not NAME.fullmatch(untrusted_name):
        raise Refusal("bad-request", f"{untrusted_name[:40]!a} is not a VM name")
    return untrusted_name


def check_generation(untrusted_generation: str) -> str:
    if not GENERATION.fullmatch(untrusted_generation):
        raise Refusal("bad-request", "generation must be 1 to 128 printable characters without space")
    return untrusted_generation


def parse_channel(untrusted_value: object) -> Channel:
    if not isinstance(untrusted_value, dict):
        raise Refusal("bad-request", "channel must be an object")
    if untrusted_value.get("type") == "kernel":
        check_keys(untrusted_value, ("type", "cid"))
        return KernelChannel(take_int(untrusted_value, "cid", CID_MIN, CID_MAX))
    if untrusted_value.get("type") == "hybrid":
        check_keys(untrusted_value, ("type", "path", "uid"))
        path = take_str(untrusted_value, "path", 4095)
        if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise Refusal("bad-request", "channel path must be absolute and plain")
        return HybridChannel(path, take_int(untrusted_value, "uid", 0, UID_MAX))
    raise Refusal("bad-request", "channel type must be kernel or hybrid")


def parse_record(request: dict[str, object]) -> Record:
    """The Record in an `add` request or a state file; raises Refusal. Does not look at its extra keys."""
    name = check_name(take_str(request, "name", 31))
    generation = check_generation(take_str(request, "generation", 128))
    secret = take_str(request, "secret", 64)
    if not SECRET.fullmatch(secret):
        raise Refusal("bad-request", "secret must be 64 lower-case hexadecimal digits")
    owner = take_int(request, "owner", 0, UID_MAX)
    record = Record(name, generation, secret, owner, parse_channel(request.get("channel")))
    if "start_timeout" in request:
        record.start_timeout = take_int(request, "start_timeout", 0, WAIT_MAX)
    fds = request.get("fds")
    if not isinstance(fds, list) or any(kind not in FD_KINDS for kind in fds) or len(set(fds)) != len(fds):
        raise Refusal("bad-request", f"fds must list each of {', '.join(FD_KINDS)} at most once")
    if "host-port" in fds and isinstance(record.channel, KernelChannel):
        raise Refusal("bad-request", "a host-port listener belongs to a hybrid channel")
    record.fds = tuple(fds)
    return record


def parse_state(data: bytes) -> Record:
    """The Record in a state file; raises Refusal."""
    state = parse_object(data)
    check_keys(state, STATE_KEYS, OPTIONAL_KEYS)
    record = parse_record(state)
    record.agent = state["agent"] is True
    record.ready = state["ready"] is True
    status = state["status"]
    record.status = status if isinstance(status, str) else ""
    return record


def save_record(directory: str, record: Record) -> None:
    save_state(directory, record.name, record.to_json())


def save_state(directory: str, name: str, state: dict[str, object]) -> None:
    """Write the state file of VM `name` atomically, readable by its writer alone. Raises OSError."""
    path = f"{directory}/{name}.json"
    temporary = f"{path}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    data = json.dumps(state).encode()
    try:
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, "state file cut short", temporary)
    finally:
        os.close(fd)
    os.rename(temporary, path)  # noqa: PTH104 pathlib would cost 2 MB for this one call


def delete_record(directory: str, name: str) -> None:
    try:
        os.unlink(f"{directory}/{name}.json")  # noqa: PTH108 as above
    except FileNotFoundError:
        return  # was never written


def read_state(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return os.read(fd, STATE_MAX)
        finally:
            os.close(fd)
    except OSError as exc:
        raise Refusal("failed", f"the state file can't be read: {exc.strerror}") from exc


def load_records(directory: str) -> Iterator[tuple[str, Record | Refusal]]:
    """Each state file's VM name with its Record or what is wrong with it."""
    return load_states(directory, parse_state)


def load_states(directory: str, parse: Callable[[bytes], Kept]) -> Iterator[tuple[str, Kept | Refusal]]:
    """Each state file's VM name with what `parse` makes of it; deletes half-written files."""
    for entry in sorted(os.listdir(directory)):  # noqa: PTH208 as above
        name, suffix = entry.partition(".")[::2]
        if suffix == "json.new":
            os.unlink(f"{directory}/{entry}")  # noqa: PTH108 as above
        if suffix != "json" or not NAME.fullmatch(name):
            continue
        try:
            record = parse(read_state(f"{directory}/{entry}"))
            if record.name != name:
                raise Refusal("bad-request", "the file is named for another VM")
        except Refusal as refusal:
            yield name, refusal
        else:
            yield name, record
