"""A VM's ssh keys: /var/lib/vmsilo/ssh/NAME with the private and public halves of `user`, `root` and `host`.

Made in the worker by the VM's first start and kept until the VM is no longer configured. The folder appears
by one rename with all keys in it, so there is no half set. `user` and `root` open the logins of the guest,
`host` is what its sshd shows; private halves leave this module for the guest (host) and, as sealed memory
files, for an authorised caller (user, root). It never decides who that is.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vmsilo_image.cpio import SshKeys

from vmsilod.errors import Failed, NoSsh

log = logging.getLogger(__name__)

SSH_DIR = Path("/var/lib/vmsilo/ssh")
KEYS = ("user", "root", "host")
KEYGEN = "ssh-keygen"
KEYGEN_PATH = "/usr/local/bin:/usr/bin:/bin"
KEYGEN_SECONDS = 30
OWNER = "owner"
KEY_MAX = 4096  # bytes; an ed25519 key has some 400
HINT = "install openssh-client, then restart the VM"


@dataclass(frozen=True)
class Door:
    """What one login needs: the private key as a sealed memory file, owned by whoever holds this, and the
    public key that the guest has to show (`ssh-ed25519 BASE64`)."""

    key_fd: int
    host_key: str


def prepare_keys(name: str, login: str, owner: int, root: Path = SSH_DIR) -> SshKeys | None:
    """What goes into the guest whose user is `login`, of a VM that the uid `owner` owns. None, with a line
    in the journal, where there can be no keys: a VM starts without ssh too.

    A new owner gets new keys: the old one may have kept those that he was given.
    """
    folder = root / name
    try:
        if not is_whole(folder) or _read(folder / OWNER) != str(owner).encode():
            make_keys(name, owner, root)
        return SshKeys(
            host=_read(folder / "host"),
            authorized={login: _read(folder / "user.pub"), "root": _read(folder / "root.pub")},
        )
    except Failed as error:
        log.info("VM %s has no ssh: %s", name, error)
        return None


def is_whole(folder: Path) -> bool:
    names = (OWNER, *(f"{key}{suffix}" for key in KEYS for suffix in ("", ".pub")))
    return all((folder / name).is_file() for name in names)


def make_keys(name: str, owner: int, root: Path = SSH_DIR) -> None:
    """Three new keys in place of what there is. One caller at a time for each VM. Raises Failed."""
    program = shutil.which(KEYGEN, path=KEYGEN_PATH)
    if program is None:
        raise Failed(f"{KEYGEN} is not installed", HINT)
    folder, fresh = root / name, root / f".{name}.new"
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        for old in (fresh, folder):
            if old.exists():
                shutil.rmtree(old)
        fresh.mkdir(mode=0o700)
        (fresh / OWNER).touch(0o600)
        (fresh / OWNER).write_text(str(owner))
        for key in KEYS:
            _generate(program, fresh / key, f"vmsilo-{name}-{key}")
        for path in (*fresh.iterdir(), fresh):
            _sync(path)
        fresh.rename(folder)
        _sync(root)
    except OSError as error:
        raise Failed(f"cannot keep ssh keys in {folder}: {error.strerror}") from error


def open_door(name: str, key: str, uid: int, root: Path = SSH_DIR) -> Door:
    """For a caller of that uid, who alone can open the memory file again; `key` is "user" or "root"."""
    folder = root / name
    if not is_whole(folder):
        raise NoSsh(f"VM '{name}' was started without ssh keys: {KEYGEN} is not installed", HINT)
    host_key = b" ".join(_read(folder / "host.pub").split()[:2]).decode()
    return Door(_seal(_read(folder / key), uid), host_key)


def keep_only(names: frozenset[str], root: Path = SSH_DIR) -> None:
    """Remove the keys of all other VMs, and what a start of theirs that was killed left."""
    for path in root.iterdir() if root.is_dir() else ():
        if path.name.removeprefix(".").removesuffix(".new") in names:
            continue
        try:
            shutil.rmtree(path)
        except OSError as error:
            log.error("cannot remove the ssh keys in %s: %s", path, error.strerror)


def _generate(program: str, path: Path, comment: str) -> None:
    argv = [program, "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, env={}, timeout=KEYGEN_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{KEYGEN} did not end in {KEYGEN_SECONDS} s") from error
    if done.returncode:
        raise Failed(f"{KEYGEN} failed: {done.stderr[:200].decode(errors='replace').strip()}")


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Failed(f"cannot read {path}: {error.strerror}") from error
    if not 0 < len(data) <= KEY_MAX:
        raise Failed(f"{path} is not a key")
    return data


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _seal(data: bytes, uid: int) -> int:
    """ssh refuses a key that others than its owner could read, and opens it by a path."""
    try:
        fd = os.memfd_create("vmsilo-ssh-key", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise Failed(f"no memory file for a key: {error.strerror}") from error
    try:
        os.write(fd, data)
        os.fchmod(fd, 0o400)
        os.fchown(fd, uid, -1)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError as error:
        os.close(fd)
        raise Failed(f"no memory file for a key: {error.strerror}") from error
    return fd
