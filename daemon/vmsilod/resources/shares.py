"""A VM's shares for one start: who serves which directory as whom, virtiofsd's arguments, and the directory
itself, opened and checked.

Called in the worker by `vmsilod.shares`. Directories are opened for reference only (O_PATH): nothing in them
is read, made or changed by root, except that the two places which were made for the desktop user are handed
to them once, while they are as they were made.
"""

from __future__ import annotations

import grp
import logging
import os
import pwd
import shutil
import stat
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmsilod.config.shares import HOME_TAG, IDS
from vmsilod.errors import StartFailed

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from vmsilod.config.model import VmConfig

log = logging.getLogger(__name__)

HOMES = Path("/shared")
TEMPLATE = Path("/var/lib/vmsilo/home-template")
MADE = {HOMES: 0o700, TEMPLATE: 0o755}  # systemd-tmpfiles makes them so, empty and root's
INSIDE = "/share"  # the directory, for virtiofsd, which sees nothing else
NOBODY = 65534
PROGRAM = "virtiofsd"
# Debian, Fedora and Arch have it in libexec or below /usr/lib. The one of /usr/lib/qemu is QEMU's old one.
PLACES = "/usr/local/libexec:/usr/local/bin:/usr/libexec:/usr/lib:/usr/lib/virtiofsd:/usr/bin"
MAX_LINKS = 40
WALK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

Ranges = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class GuestUser:
    """The guest's user, as the image's manifest says; the group has the same number."""

    login: str
    uid: int


@dataclass(frozen=True)
class Share:
    """`uid`, `gid`: who serves it on the host. Without maps every user of the guest is that one."""

    tag: str
    path: Path
    mount: str
    readonly: bool
    cache: str
    uid: int
    gid: int
    guest_id: int
    uid_map: Ranges | None = None
    gid_map: Ranges | None = None
    many: bool = False
    """Files of several users: served by root with the rights that this takes."""
    inode: tuple[int, int] | None = None
    """Device and inode of the directory that was opened for it; None: whatever the path leads to."""

    @property
    def is_home(self) -> bool:
        return self.tag == HOME_TAG


def find_virtiofsd() -> str:
    found = shutil.which(PROGRAM, path=PLACES)
    if found is None:
        raise StartFailed(
            "shared directories need virtiofsd, which is not installed",
            "apt install virtiofsd (Debian 13; Debian 12 has none); or shared_home = false and no"
            " shared_directories",
        )
    return found


def plan_shares(config: VmConfig, guest: GuestUser) -> tuple[Share, ...]:
    """In the order of the configuration, the home first. Looks up accounts and nothing else."""
    try:
        owner = pwd.getpwnam(config.user)
    except KeyError as error:
        raise StartFailed(f"the configured user '{config.user}' does not exist any more") from error
    shares = []
    if config.shared_home is not False:
        path = HOMES / config.name if config.shared_home is True else Path(config.shared_home)
        mount = f"/home/{guest.login}"
        shares.append(
            Share(
                HOME_TAG, path, mount, readonly=False, cache="auto", uid=owner.pw_uid, gid=owner.pw_gid,
                guest_id=guest.uid,
            )
        )  # fmt: skip
        for entry in config.shared_directories:
            if entry.mount == mount:
                raise StartFailed(
                    f"the share '{entry.tag}' of VM '{config.name}' would be mounted over its shared home",
                    f"another mount than {mount}, or shared_home = false",
                )
    for entry in config.shared_directories:
        uid = _choose(entry.uid, entry.uid_map, owner.pw_uid, many=entry.has_many)
        gid = _choose(entry.gid, entry.gid_map, _find_group(uid, owner), many=entry.has_many)
        shares.append(
            Share(
                entry.tag, Path(entry.path), entry.mount, entry.readonly, entry.cache, uid, gid, guest.uid,
                entry.uid_map, entry.gid_map, entry.has_many, config.shared_inode,
            )
        )  # fmt: skip
    return tuple(shares)


def _choose(one: int | None, ranges: Ranges | None, default: int, *, many: bool) -> int:
    if many:
        return 0
    if one is not None:
        return one
    return ranges[0][1] if ranges is not None else default


def _find_group(uid: int, owner: pwd.struct_passwd) -> int:
    if uid == owner.pw_uid:
        return owner.pw_gid
    try:
        return pwd.getpwuid(uid).pw_gid
    except KeyError:
        return uid


def plan_arguments(share: Share, program: str, *, tells_tag: bool = False) -> list[str]:
    """virtiofsd's command line but for its socket. Its own sandbox would want namespaces, or root; that it
    has is its unit's. `tells_tag`: the VMM asks it for the tag; QEMU only wonders at one that could tell.
    """
    argv = [program, "--shared-dir", INSIDE, "--sandbox", "none", "--seccomp", "kill"]
    argv += ["--tag", share.tag] if tells_tag else []
    # The limit is the unit's. Every file that the guest knows costs a descriptor.
    argv += ["--rlimit-nofile", "0", "--cache", share.cache, "--log-level", "warn"]
    argv += ["--readonly"] if share.readonly else []
    if share.many:
        # As root it takes itself these capabilities, and fails where it cannot.
        argv += ["--modcaps=-mknod:-setfcap"]
    elif share.uid == 0:
        argv += ["--modcaps=-mknod:-setfcap:-chown:-dac_override:-fowner:-fsetid:-setgid:-setuid"]
    # Root can serve the groups of several users only if it may become them.
    everybody = not share.many
    for kind, own, ranges in (("uid", share.uid, share.uid_map), ("gid", share.gid, share.gid_map)):
        for rule in _translate(own, share.guest_id, ranges, squash=everybody):
            argv += [f"--translate-{kind}", rule]
    return argv


def _translate(own: int, guest: int, ranges: Ranges | None, *, squash: bool) -> Iterator[str]:
    if ranges is None and squash:
        # Whoever makes a file in the guest, its root too: it is the serving user's on the host.
        yield f"squash-guest:0:{own}:{IDS}"
        known = {own: guest} | ({0: 0} if own else {})
        for host, shown in known.items():
            yield f"host:{host}:{shown}:1"
        yield from (f"squash-host:{a}:{NOBODY}:{n}" for a, n in _gaps((h, 1) for h in known))
        return
    if ranges is None:
        return  # one to one
    yield from (f"map:{inner}:{outer}:{count}" for inner, outer, count in ranges)
    yield from (f"forbid-guest:{a}:{n}" for a, n in _gaps((r[0], r[2]) for r in ranges))
    yield from (f"squash-host:{a}:{NOBODY}:{n}" for a, n in _gaps((r[1], r[2]) for r in ranges))


def _gaps(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(start, count) of what is between the given ones, up to the last number."""
    place = 0
    for start, count in sorted(ranges):
        if start > place:
            yield place, start - place
        place = start + count
    if place < IDS:
        yield place, IDS - place


def plan_mounts(shares: Iterable[Share]) -> dict[str, str]:
    """Path below the guest's /run/systemd -> text: a mount unit of each, before anything that is not early
    boot. Where one cannot be mounted the guest does not become ready: what a user wrote into the directory
    below would be lost.
    """
    files = {}
    for share in shares:
        options = "nosuid,nodev" + (",ro" if share.readonly else "")
        files[f"system/{mount_unit(share.mount)}"] = (
            f"[Unit]\nDescription=Shared directory {share.tag}\n\n"
            f"[Mount]\nWhat={share.tag}\nWhere={_escape(share.mount)}\nType=virtiofs\nOptions={options}\n"
        )
    if files:
        units = " ".join(name.removeprefix("system/") for name in files)
        files["system/local-fs.target.d/10-vmsilo-shares.conf"] = (
            f"[Unit]\nRequires={units}\nAfter={units}\n"
        )
    return files


def mount_unit(place: str) -> str:
    return f"{escape_path(place)}.mount"


def escape_path(path: str) -> str:
    """systemd.unit(5), String Escaping for Inclusion in Unit Names. No '//', '.' and '..' in the path."""
    out = []
    for index, byte in enumerate(path.strip("/").encode()):
        char = chr(byte)
        if char == "/":
            out.append("-")
        elif (char.isascii() and char.isalnum()) or char in ":_" or (char == "." and index):
            out.append(char)
        else:
            out.append(f"\\x{byte:02x}")
    return "".join(out)


def _escape(text: str) -> str:
    return text.replace("%", "%%")


def open_directory(path: Path, users: Collection[int]) -> int:
    """The directory, by a way that nobody but root and `users` can change; the caller owns the descriptor.

    No symbolic link is followed but those of root: a guest that another directory on the way is shared with
    can make links. The directory itself may have any mode. `_walk` never opens more than the inode.
    """
    with ExitStack() as stack:
        place = _walk(stack, path, users)
        status = os.fstat(place)
        if not stat.S_ISDIR(status.st_mode):
            raise StartFailed(f"{path} is not a directory")
        return os.open(f"/proc/self/fd/{place}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _walk(stack: ExitStack, path: Path, users: Collection[int]) -> int:
    parts, links = list(reversed(path.parts[1:])), 0
    place = root = os.open("/", WALK | os.O_DIRECTORY)
    stack.callback(os.close, place)
    while parts:
        _check_way(place, path)
        name = parts.pop()
        try:
            step = os.open(name, WALK, dir_fd=place)
        except FileNotFoundError as error:
            raise StartFailed(f"the shared directory {path} does not exist ({name})") from error
        except OSError as error:
            raise StartFailed(
                f"cannot open the shared directory {path}: {error.strerror} ({name})"
            ) from error
        stack.callback(os.close, step)
        status = os.fstat(step)
        if not stat.S_ISLNK(status.st_mode):
            if status.st_uid != 0 and status.st_uid not in users:
                raise StartFailed(
                    f"{name} on the way to the shared directory {path} belongs to uid {status.st_uid}",
                    "it has to be root's, the desktop user's or that of the share's uid",
                )
            place = step
            continue
        links += 1
        if status.st_uid != 0 or os.fstat(place).st_uid != 0 or links > MAX_LINKS:
            raise StartFailed(
                f"{name} on the way to the shared directory {path} is a symbolic link",
                "name the directory itself: links of users are not followed, a guest could have made them",
            )
        target = Path(os.readlink("", dir_fd=step))
        if target.is_absolute():
            place = root
        parts.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
    return place


def _check_way(place: int, path: Path) -> None:
    """Who may write to a directory may put another into the place of one in it, unless it is sticky."""
    status = os.fstat(place)
    mode = status.st_mode
    if mode & stat.S_ISVTX:
        return
    if mode & 0o002 or (mode & 0o020 and not _is_private_group(status)):
        where = Path(f"/proc/self/fd/{place}").readlink()
        raise StartFailed(
            f"{where} on the way to the shared directory {path} has mode {stat.S_IMODE(mode):04o}: others"
            " could exchange what is in it",
            f"chmod go-w {where}",
        )


def _is_private_group(status: os.stat_result) -> bool:
    """Whether the group is its owner's own and has nobody else in it, as Fedora (umask 0002) makes it."""
    try:
        owner, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    own = owner.pw_gid == group.gr_gid and owner.pw_name == group.gr_name
    return status.st_gid == 0 or (own and set(group.gr_mem) <= {owner.pw_name})


def has_home(share: Share) -> bool:
    """Whether the home is there; StartFailed for something else in its place, or if it is not safe there."""
    status = _look_at(share.path)
    if share.path.is_relative_to(HOMES):
        _check_homes(share, exists=status is not None)
    if status is None:
        _check_template(share)
        return False
    if stat.S_ISDIR(status.st_mode) and status.st_uid != share.uid:
        raise StartFailed(
            f"the shared home {share.path} belongs to uid {status.st_uid}, not to the configured user",
            f"chown it, or name another directory: shared_home = PATH (uid {share.uid})",
        )
    return True


def _look_at(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StartFailed(f"cannot look at the shared home {path}: {error.strerror}") from error


def _check_homes(share: Share, *, exists: bool) -> None:
    """A guest chooses the modes in its home: nobody else may come near. It is made by the user alone."""
    try:
        status = HOMES.stat()
    except OSError as error:
        raise StartFailed(
            f"cannot look at {HOMES}, where the shared home {share.path} belongs: {error.strerror}",
            'systemd-tmpfiles --create makes it; or shared_home = "/path"',
        ) from error
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077 or status.st_uid not in ((0, share.uid) if exists else (share.uid,)):
        raise StartFailed(
            f"{HOMES}, where the shared home {share.path} belongs, is owned by {_name_user(status.st_uid)}"
            f" and has mode {mode:04o}",
            f"it has to be {_name_user(share.uid)}'s and 0700 (chown, chmod) if it is for homes alone;"
            ' else shared_home = "/path"',
        )


def _check_template(share: Share) -> None:
    status = _look_at(TEMPLATE)
    if status is not None and status.st_uid not in (0, share.uid):
        raise StartFailed(
            f"{TEMPLATE}, which the shared home {share.path} would be a copy of, is owned by"
            f" {_name_user(status.st_uid)}",
            f"chown -R {_name_user(share.uid)}: {TEMPLATE}",
        )


def _name_user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def is_same(first: int, second: int) -> bool:
    """Whether two descriptors are of one inode."""
    one, other = os.fstat(first), os.fstat(second)
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def hand_over_places(user: str, places: Mapping[Path, int] = MADE) -> None:
    """Root's as they were made, the configured user's from then on. What looks otherwise is somebody's own:
    a start that needs it says so (`has_home`).
    """
    try:
        owner = pwd.getpwnam(user)
    except KeyError:
        return
    for path, mode in places.items():
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            log.info("ignoring: cannot open %s: %s", path, error.strerror)
            continue
        try:
            status = os.fstat(fd)
            with os.scandir(fd) as entries:
                empty = next(entries, None) is None
            if status.st_uid == 0 and stat.S_IMODE(status.st_mode) == mode and empty:
                os.fchown(fd, owner.pw_uid, owner.pw_gid)
        except OSError as error:
            log.warning("cannot give %s to %s: %s", path, user, error.strerror)
        finally:
            os.close(fd)
