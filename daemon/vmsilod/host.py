"""Facts about this host that every VM start needs: accounts, vsock, VMMs, KVM.

Probed in the worker when the configuration is loaded and before each start; it changes nothing.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
from dataclasses import dataclass
from pathlib import Path

from vmsilod.errors import Failed, StartFailed
from vmsilod.resources import vsock
from vmsilod.vmm.choose import KvmStatus, probe_kvm

RELAY_GROUP = "vmsilo"
SECURITY_MODULES = Path("/sys/kernel/security/lsm")
LANDLOCK_SINCE = (6, 2)  # ABI 3, which cloud-hypervisor insists on
LIBDIR = Path(os.environ.get("VMSILO_LIBDIR", "/usr/local/lib/vmsilo"))


@dataclass(frozen=True)
class Host:
    """`hybrid_device` is None where the kernel has vhost-vsock (or nothing can stand in for it)."""

    relay_gid: int
    kernel_vsock: bool
    hybrid_device: str | None
    groups: frozenset[str]
    kvm: KvmStatus
    landlock: bool = False

    @property
    def hybrid(self) -> bool:
        return not self.kernel_vsock

    def require_vsock(self) -> None:
        if not self.kernel_vsock and self.hybrid_device is None:
            raise StartFailed(
                f"this kernel has no {vsock.VHOST_VSOCK}, and {vsock.HYBRID_DEVICE} is not installed",
                f"modprobe vhost_vsock, or install {vsock.HYBRID_DEVICE}",
            )


def probe_host() -> Host:
    try:
        relay_gid = grp.getgrnam(RELAY_GROUP).gr_gid
    except KeyError as error:
        raise Failed(f"there is no group '{RELAY_GROUP}'", "systemd-sysusers") from error
    kernel = vsock.has_kernel_vsock()
    hybrid = None if kernel else vsock.find_hybrid_device()
    groups = frozenset(group.gr_name for group in grp.getgrall())
    return Host(relay_gid, kernel, hybrid, groups, kvm=probe_kvm(), landlock=has_landlock())


def has_landlock(modules: Path = SECURITY_MODULES, release: str | None = None) -> bool:
    """Whether this kernel has Landlock, switched on and new enough for cloud-hypervisor."""
    found = re.match(r"([0-9]+)\.([0-9]+)", release or os.uname().release)
    try:
        active = modules.read_text().strip().split(",")
    except OSError:
        return False
    return "landlock" in active and found is not None and (int(found[1]), int(found[2])) >= LANDLOCK_SINCE


def find_uid(user: str) -> int:
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError as error:
        raise StartFailed(f"the configured user '{user}' does not exist any more") from error
