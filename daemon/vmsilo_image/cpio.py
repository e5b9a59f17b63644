"""newc cpio archives, the format of a Linux initramfs. Pure functions; imports nothing beyond the small
standard library, because vmsilod imports this for `secret_archive`.

Format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel. Archives may simply follow
each other when each starts at a multiple of 4 bytes.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
ALIGN = 4
SECRET = re.compile(r"[0-9a-f]{64}")
_STEP = r"[A-Za-z0-9_\\][A-Za-z0-9._@+:\\-]*"
NETWORK_FILE = re.compile(rf"(networkd\.conf\.d|network|resolved\.conf\.d)/{_STEP}")
STORAGE_FILE = re.compile(
    rf"init/{_STEP}|system/{_STEP}\.mount|system/(local-fs|multi-user)\.target\.d/[0-9a-z-]+\.conf"
)
LOGIN = re.compile(r"[a-z_][a-z0-9_-]{0,30}")


@dataclass(frozen=True)
class SshKeys:
    """What a guest's sshd gets from its host: its own private key, and for each login the public key (a line
    of authorized_keys) that opens it."""

    host: bytes
    authorized: Mapping[str, bytes]


@dataclass(frozen=True)
class Entry:
    """One member, owned by root. `mode` carries the file type; a symbolic link's `data` is its target."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, mode: int = 0o755) -> Entry:
    return Entry(name, stat.S_IFDIR | mode)


def regular(name: str, data: bytes, mode: int = 0o644) -> Entry:
    return Entry(name, stat.S_IFREG | mode, data)


def symlink(name: str, target: str) -> Entry:
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def character_device(name: str, mode: int, device: tuple[int, int]) -> Entry:
    return Entry(name, stat.S_IFCHR | mode, device=device)


def newc_archive(entries: Iterable[Entry]) -> bytes:
    """The archive with its trailer, its length a multiple of 4. Parents must come before their children."""
    out = bytearray()
    for number, entry in enumerate(entries, start=1):
        _append(out, number, entry)
    _append(out, 0, Entry(TRAILER, 0))
    return bytes(out)


def secret_archive(
    secret_hex: str, ssh: SshKeys | None = None, network: Mapping[str, str] | None = None
) -> bytes:
    """What the host appends to an image's initrd for one boot: /vmsilo/secret, mode 0400, the keys below
    /vmsilo/ssh, and `network`, files for /run/systemd by their path there; below init/ those that init
    itself reads. sshd reads authorized keys, which are public, with the rights of the login; networkd and
    resolved have uids of their own, too.
    """
    if not SECRET.fullmatch(secret_hex):
        raise ValueError("a secret is 64 lower-case hexadecimal digits")
    entries = [directory("vmsilo", 0o711), regular("vmsilo/secret", secret_hex.encode() + b"\n", 0o400)]
    if ssh is not None:
        entries += [directory("vmsilo/ssh", 0o711), regular("vmsilo/ssh/host_key", ssh.host, 0o400)]
        entries.append(directory("vmsilo/ssh/authorized", 0o711))
        entries += [
            regular(f"vmsilo/ssh/authorized/{check_login(login)}", line, 0o444)
            for login, line in ssh.authorized.items()
        ]
    entries += _network_entries(network or {})
    return newc_archive(entries)


def _network_entries(network: Mapping[str, str]) -> list[Entry]:
    if not network:
        return []
    for name in network:
        if not (NETWORK_FILE.fullmatch(name) or STORAGE_FILE.fullmatch(name)):
            raise ValueError(f"{name!r} is not the name of a file for a guest's /run/systemd")
    folders = sorted({str(folder) for name in network for folder in PurePosixPath(name).parents} - {"."})
    entries = [directory("vmsilo/systemd"), *(directory(f"vmsilo/systemd/{folder}") for folder in folders)]
    entries += [regular(f"vmsilo/systemd/{name}", text.encode()) for name, text in network.items()]
    return entries


def check_login(login: str) -> str:
    """The name itself; it becomes the name of a file."""
    if not LOGIN.fullmatch(login):
        raise ValueError(f"{login!r} is not the name of a login")
    return login


def pad(data: bytes, align: int = ALIGN) -> bytes:
    return data + bytes(-len(data) % align)


def _append(out: bytearray, number: int, entry: Entry) -> None:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    major, minor = entry.device
    fields = (number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, major, minor, len(name), 0)
    out += MAGIC + b"".join(b"%08X" % field for field in fields) + name
    out += bytes(-len(out) % ALIGN)
    out += entry.data
    out += bytes(-len(out) % ALIGN)
