"""Turns a fresh Debian tree into a vmsilo guest: agent, units, user, and nothing that only costs boot time.
Called by build on the private tree; plain files where possible, the guest's own programs in a chroot where
not.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import tools
from .errors import ImageError
from .tree import empty_folder, find_ids, resolve_inside, write_file, write_link
from .trim import trim_root

if TYPE_CHECKING:
    from pathlib import Path

    from .recipe import FileEntry, Recipe

HOME = "/usr/lib/vmsilo"
SYSTEM_UNITS = "/etc/systemd/system"
USER_UNITS = "/etc/systemd/user"

# Not worth their space in a guest. /usr/share/doc keeps the licences: only they stay (see EXCLUDED).
EMPTIED = ("/boot", "/tmp", "/var/tmp", "/var/lib/apt/lists", "/var/cache/apt", "/var/log", "/run")
EXCLUDED = (
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
)
UNITS_OF_PACKAGES = "/usr/lib/systemd/system"
NETWORK_TARGET = "vmsilo-network.target"
RESOLVED = "systemd-resolved.service"
LOCALE = b"LANG=C.UTF-8\n"
FILES = {
    "/etc/machine-id": b"",
    "/etc/hosts": b"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n",
    "/etc/resolv.conf": b"# A VM without interfaces has no name server.\n",
    "/etc/fstab": b"",
    "/etc/locale.conf": LOCALE,
    "/etc/default/locale": LOCALE,
    # Their absence makes systemd rebuild hardware database, catalogue and users at every boot.
    "/etc/.updated": b"",
    "/var/.updated": b"",
}


@dataclass(frozen=True)
class GuestFiles:
    """Where the guest's half of vmsilo is on this host."""

    image: Path
    packages: tuple[Path, ...]

    def digest(self) -> str:
        """sha256 over the agent and everything in guest/image."""
        total = hashlib.sha256()
        for base in (self.image, *self.packages):
            for path in sorted(base.rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    total.update(f"{base.name}/{path.relative_to(base)}\0".encode())
                    total.update(hashlib.sha256(path.read_bytes()).digest())
        return total.hexdigest()

    def read(self, name: str) -> bytes:
        try:
            return (self.image / name).read_bytes()
        except OSError as error:
            raise ImageError(f"{self.image / name} cannot be read: {error.strerror}") from error


def find_guest_files(package: Path) -> GuestFiles:
    """LIBDIR/guest beside the installed package, or guest/ of the source tree."""
    for base in (package.parent, package.parent.parent):
        image = base / "guest" / "image"
        if not image.is_dir():
            continue
        found = [
            next((p for p in (base / "guest" / name, base / name) if p.is_dir()), None)
            for name in ("vmsilo_agent", "vmsilo_wire")
        ]
        packages = tuple(path for path in found if path is not None)
        if len(packages) == len(found):
            return GuestFiles(image, packages)
    raise ImageError("the guest's files are not installed beside vmsilo-image", "Install vmsilo completely.")


def configure_root(root: Path, release: str, recipe: Recipe, guest: GuestFiles, log: Path) -> None:
    # The kernel's packages leave links to /boot, whose content is outside the image.
    for link in ("vmlinuz", "vmlinuz.old", "initrd.img", "initrd.img.old"):
        (root / link).unlink(missing_ok=True)
    resolve_inside(root, "/etc").joinpath("hostname").unlink(missing_ok=True)
    for path, data in FILES.items():
        write_file(root, path, data, 0o444 if path == "/etc/machine-id" else 0o644)
    install_agent(root, guest, log)
    install_units(root, guest)
    install_sshd(root, guest)
    install_console_login(root, guest, recipe.user)
    install_network(root, guest)
    trim_root(root, release)
    install_user(root, recipe, log)
    for entry in recipe.files:
        install_entry(root, entry)
    enable_own_network(root)
    for path in EMPTIED:
        empty_folder(root, path)


def install_agent(root: Path, guest: GuestFiles, log: Path) -> None:
    home = resolve_inside(root, HOME)
    home.mkdir(mode=0o755, exist_ok=True)
    for package in guest.packages:
        target = home / package.name
        shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        for path in (target, *target.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
            shutil.chown(path, 0, 0)
    # The script finds the packages beside it.
    (home / "vmsilo_agent/vmsilo-agent").rename(home / "vmsilo-agent")
    (home / "vmsilo-agent").chmod(0o755)
    # Unchecked: the root never changes, and a stat per module is one more exit to the host.
    compile_argv = ["python3", "-I", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", HOME]
    tools.run_chroot(root, compile_argv, log)


def install_units(root: Path, guest: GuestFiles) -> None:
    write_file(root, f"{SYSTEM_UNITS}/vmsilo-agent.service", guest.read("vmsilo-agent.service"))
    write_file(root, f"{USER_UNITS}/vmsilo-session.service", guest.read("vmsilo-session.service"))
    write_file(root, "/etc/systemd/journald.conf.d/vmsilo.conf", guest.read("journald.conf"))
    wants = f"{SYSTEM_UNITS}/multi-user.target.wants/vmsilo-agent.service"
    write_link(root, wants, "../vmsilo-agent.service")
    wants = f"{USER_UNITS}/default.target.wants/vmsilo-session.service"
    write_link(root, wants, "../vmsilo-session.service")
    write_link(root, f"{SYSTEM_UNITS}/default.target", "/usr/lib/systemd/system/multi-user.target")


def install_sshd(root: Path, guest: GuestFiles) -> None:
    """sshd on vsock (systemd-ssh-generator listens), with keys that come with each boot and none of the
    image's: those would be the same in all its VMs."""
    write_file(root, f"{HOME}/sshd_config", guest.read("sshd_config"))
    write_file(root, f"{SYSTEM_UNITS}/sshd-vsock@.service", guest.read("sshd-vsock@.service"))
    write_file(root, f"{SYSTEM_UNITS}/sshd-vsock.socket.d/vmsilo.conf", guest.read("sshd-vsock.conf"))
    folder = resolve_inside(root, "/etc/ssh")
    for key in folder.glob("ssh_host_*"):
        key.unlink()


def install_console_login(root: Path, guest: GuestFiles, user: str) -> None:
    """The guest's user, logged in on the serial console, which only the VM's owner reaches on the host."""
    service = guest.read("vmsilo-console-login.service").replace(b"@user@", user.encode())
    write_file(root, f"{SYSTEM_UNITS}/vmsilo-console-login.service", service)
    timer = guest.read("vmsilo-console-login.timer")
    write_file(root, f"{SYSTEM_UNITS}/vmsilo-console-login.timer", timer)
    wants = f"{SYSTEM_UNITS}/multi-user.target.wants/vmsilo-console-login.timer"
    write_link(root, wants, "../vmsilo-console-login.timer")


def install_network(root: Path, guest: GuestFiles) -> None:
    """networkd and resolved, which a boot starts only where it has a network."""
    write_file(root, f"{SYSTEM_UNITS}/{NETWORK_TARGET}", guest.read(NETWORK_TARGET))
    drop_ins = {"systemd-networkd-wait-online.service": "wait-online.conf", RESOLVED: "resolved.conf"}
    for unit, drop_in in drop_ins.items():
        write_file(root, f"{SYSTEM_UNITS}/{unit}.d/vmsilo.conf", guest.read(drop_in))
    # The package has enabled it for every boot.
    (resolve_inside(root, f"{SYSTEM_UNITS}/sysinit.target.wants") / RESOLVED).unlink(missing_ok=True)
    if (resolve_inside(root, UNITS_OF_PACKAGES) / RESOLVED).is_file():
        write_link(root, "/etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")


def enable_own_network(root: Path) -> None:
    """Of an image that brings a network configuration, such as for a card that was passed through."""
    if any(resolve_inside(root, "/etc/systemd/network").glob("*.network")):
        wants = f"{SYSTEM_UNITS}/multi-user.target.wants/{NETWORK_TARGET}"
        write_link(root, wants, f"../{NETWORK_TARGET}")


def install_user(root: Path, recipe: Recipe, log: Path) -> None:
    """The guest's user with a home and a lingering manager; no password opens it or root."""
    line = f'u {recipe.user} {recipe.uid} "VM user" /home/{recipe.user} /bin/bash\n'
    if not (resolve_inside(root, "/usr/lib/sysusers.d")).is_dir():
        raise ImageError("the image has no systemd", 'Add "systemd" and "systemd-sysv" to packages.')
    write_file(root, "/etc/sysusers.d/vmsilo.conf", line.encode())
    tools.run_chroot(root, ["systemd-sysusers", "/etc/sysusers.d/vmsilo.conf"], log)
    ids = find_ids(root, recipe.user)
    if ids[0] != recipe.uid:
        raise ImageError(f"user {recipe.user} exists in the image with uid {ids[0]}, not {recipe.uid}")
    home = resolve_inside(root, f"/home/{recipe.user}")
    shutil.copytree(resolve_inside(root, "/etc/skel"), home, dirs_exist_ok=True, symlinks=True)
    for path in (home, *home.rglob("*")):
        os.chown(path, *ids, follow_symlinks=False)
    home.chmod(0o700)
    write_file(root, f"/var/lib/systemd/linger/{recipe.user}", b"")
    settings = json.dumps({"user": recipe.user}) + "\n"
    write_file(root, "/etc/vmsilo/agent.json", settings.encode())
    lock_root(root)


def lock_root(root: Path) -> None:
    shadow = resolve_inside(root, "/etc/shadow")
    text = re.sub(r"^root:[^:]*:", "root:!*:", shadow.read_text(), flags=re.MULTILINE)
    status = shadow.stat()
    owner = (status.st_uid, status.st_gid)
    write_file(root, "/etc/shadow", text.encode(), stat.S_IMODE(status.st_mode), owner)


def install_entry(root: Path, entry: FileEntry) -> None:
    if entry.source is not None:
        try:
            data = entry.source.read_bytes()
        except OSError as error:
            raise ImageError(f"{entry.source} cannot be read: {error.strerror}") from error
    else:
        data = (entry.content or "").encode()
    write_file(root, entry.path, data, int(entry.mode, 8), find_ids(root, entry.owner))
