"""Directories of the host that a VM shares: `shared_home` and `shared_directories`, as values.

Part of the schema; what one VM's shares are to each other is checked here too. It never looks at the
machine: whether a directory exists is asked when the VM starts (`vmsilod.resources.shares`).
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from vmsilod.config.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

HOME_TAG = "vmsilo-home"  # people's own do not begin like that
SHARES_MAX = 16  # per VM: each is a process and a device
IDS = 2**32 - 1  # 4294967295 itself is no user: "unchanged" in chown(2)
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,34}")  # virtio-fs has 36 bytes
_BAD_PATH = re.compile(r"""["\\:$]""")  # each means something in a unit file
# Where the host keeps what makes it the host. Below /run is what is mounted for people.
_REFUSED_HOST = ("/etc", "/proc", "/sys", "/dev", "/boot", "/root", "/run", "/var/run", "/var/lib/vmsilo")
_ALLOWED_HOST = ("/run/media",)
_REFUSED_GUEST = (
    *("/etc", "/proc", "/sys", "/dev", "/boot", "/run", "/var/run", "/usr", "/bin", "/sbin"),
    *("/lib", "/lib32", "/lib64", "/libx32"),
)

CacheMode = Literal["auto", "always", "never"]


def check_host_path(path: str) -> str:
    pure = _check_path(path)
    if any(pure.is_relative_to(place) for place in _ALLOWED_HOST):
        return str(pure)
    for place in _REFUSED_HOST:
        if pure.is_relative_to(place) or PurePosixPath(place).is_relative_to(pure):
            raise ValueError(
                f"'{path}' cannot be shared: the host needs {_name_place(pure, place)} for itself"
            )
    return str(pure)


def _check_mount(path: str) -> str:
    pure = _check_path(path)
    for place in _REFUSED_GUEST:
        if pure.is_relative_to(place) or PurePosixPath(place).is_relative_to(pure):
            raise ValueError(
                f"'{path}' cannot be a mount point: the guest needs {_name_place(pure, place)} for itself"
            )
    return str(pure)


def _name_place(pure: PurePosixPath, place: str) -> str:
    return str(pure) if pure == PurePosixPath("/") else place


def _check_path(path: str) -> PurePosixPath:
    if not path.startswith("/"):
        raise ValueError(f"'{path}' is not an absolute path")
    if not path.isprintable():
        raise ValueError(f"'{path}' has a control character in it")
    if bad := _BAD_PATH.search(path):
        raise ValueError(f"'{path}' has {bad[0]} in it")
    pure = PurePosixPath("/", *PurePosixPath(path).parts[1:])
    if ".." in pure.parts:
        raise ValueError(f"'{path}' has '..' in it")
    return pure


def _check_tag(tag: str) -> str:
    if not _TAG.fullmatch(tag):
        raise ValueError(f"'{tag}' is not a tag: up to 35 letters, digits, '.', '_' or '-'")
    if tag.startswith("vmsilo-"):
        raise ValueError(f"'{tag}' is a tag of vmsilo's own")
    return tag


def _check_proto(proto: str) -> str:
    if proto == "9p":
        raise ValueError("'9p' is not offered: \"virtiofs\" does the same, faster; leave proto out")
    if proto != "virtiofs":
        raise ValueError(f"'{proto}' is not \"virtiofs\"")
    return proto


def _split_map(value: Any) -> Any:  # whatever TOML gave; pydantic checks the result
    """ "0 0 65535" and "0 1000 1,1 100001 999", as crosvm has it, mean lists of three numbers."""
    if not isinstance(value, str):
        return value
    ranges = []
    for text in value.split(","):
        words = text.split()
        if len(words) != 3 or not all(word.isdecimal() and word.isascii() for word in words):
            raise ValueError(f"'{text.strip()}' is not of the form \"GUEST HOST COUNT\"")
        ranges.append([int(word) for word in words])
    return ranges


def _check_map(ranges: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, int, int], ...]:
    if not ranges:
        raise ValueError("an empty map would let nobody in; leave it out")
    for guest, host, count in ranges:
        if count < 1 or guest < 0 or host < 0 or max(guest, host) + count > IDS:
            raise ValueError(f"'{guest} {host} {count}' is not a range of user or group numbers")
    for side, name in ((0, "guest"), (1, "host")):
        ends = 0
        for entry in sorted(ranges, key=lambda entry: entry[side]):
            if entry[side] < ends:
                raise ValueError(f"two ranges have {entry[side]} of the {name}")
            ends = entry[side] + entry[2]
    return ranges


IdMap = Annotated[
    tuple[Annotated[tuple[int, int, int], Field(strict=False)], ...],
    Field(strict=False),
    BeforeValidator(_split_map),
    AfterValidator(_check_map),
]
HostPath = Annotated[str, AfterValidator(check_host_path)]
Id = Annotated[int, Field(ge=0, lt=IDS)]
_SEED_NAMES = {"id": "tag", "uidmap": "uid_map", "gidmap": "gid_map"}


class SharedDirectory(Table):
    """`uid`, `gid`: whom the files belong to on the host (None: the desktop user); the maps: guest, host and
    count of ranges that are the same one by one.
    """

    path: HostPath
    tag: Annotated[str, AfterValidator(_check_tag)] = ""
    mount: Annotated[str, AfterValidator(_check_mount)] = ""
    readonly: bool = False
    cache: CacheMode = "auto"
    uid: Id | None = None
    gid: Id | None = None
    uid_map: IdMap | None = None
    gid_map: IdMap | None = None
    proto: Annotated[str, AfterValidator(_check_proto)] = "virtiofs"

    @model_validator(mode="before")
    @classmethod
    def complete(cls, value: Any) -> Any:
        """The names that crosvm and others have for some keys; tag and mount follow from each other."""
        if not isinstance(value, dict):
            return value
        content = dict(value)
        for alias, name in _SEED_NAMES.items():
            if alias in content:
                if name in content:
                    raise ValueError(f"'{alias}' and '{name}' are the same: one of them is enough")
                content[name] = content.pop(alias)
        tag, mount = content.get("tag"), content.get("mount")
        if tag is None and mount is None:
            raise ValueError("needs a tag or a mount: where is the guest to see it?")
        if tag is None and isinstance(mount, str):
            derived = "-".join(PurePosixPath(mount).parts[1:]).replace(" ", "_")[:35]
            content["tag"] = derived or "share"
        if mount is None:
            content["mount"] = f"/mnt/{tag}"
        return content

    @model_validator(mode="after")
    def check_ids(self) -> SharedDirectory:
        """Who serves it must be one user, or all of those in the maps."""
        for name, one, ranges in (("uid", self.uid, self.uid_map), ("gid", self.gid, self.gid_map)):
            if one is not None and ranges is not None and [entry[1:] for entry in ranges] != [(one, 1)]:
                raise ValueError(f"{name} = {one} and a {name}_map of other numbers: leave {name} out")
        if self.gid_map is not None and _counts_many(self.gid_map) and not self.has_many:
            raise ValueError("a gid_map of several groups needs a uid_map of several users")
        return self

    @property
    def has_many(self) -> bool:
        """Its files belong to several users of the host, so that only root can serve it."""
        return self.uid_map is not None and _counts_many(self.uid_map)


def _counts_many(ranges: Sequence[tuple[int, int, int]]) -> bool:
    return len(ranges) > 1 or ranges[0][2] > 1


def _check_shares(shares: tuple[SharedDirectory, ...]) -> tuple[SharedDirectory, ...]:
    if len(shares) > SHARES_MAX:
        raise ValueError(f"{len(shares)} shares are more than {SHARES_MAX}")
    for kind, values in (("tag", [s.tag for s in shares]), ("mount", [s.mount for s in shares])):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(f"more than one share has the {kind} {', '.join(twice)}")
    return shares


SharedDirectories = Annotated[
    tuple[SharedDirectory, ...], Field(strict=False), AfterValidator(_check_shares)
]


def _check_home(value: Any) -> Any:  # whatever TOML gave
    if isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError("is true, false or the path of a directory")
    return check_host_path(value)


def _check_home_default(value: Any) -> Any:  # as above
    if isinstance(value, str):
        raise ValueError("is true or false here: one home for all VMs would be no separation")
    return value


SharedHome = Annotated[bool | str, BeforeValidator(_check_home)]
SharedHomeDefault = Annotated[bool, BeforeValidator(_check_home_default)]
