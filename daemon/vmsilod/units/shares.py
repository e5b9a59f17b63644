"""The text of the units that serve a VM's shared directories, and of the one that makes its home, as a pure
function.

Called by render.py for each VM; empty for one that shares nothing. '@' keeps a tag apart from all other
unit names: no VM's name has one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsilod.config.shares import HOME_TAG
from vmsilod.units.hardening import HOME_MAKER, SHARE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsilod.config import VmConfig
    from vmsilod.units.render import UnitContext

HOMES = "/shared"
TEMPLATE = "/var/lib/vmsilo/home-template"
CONTROL = "/run/vmsilo/control.sock"
INSIDE = "/share"
ROOM = 1024  # MiB
_RUNTIME = ("/usr", "/lib", "-/lib64", "-/etc/ld.so.cache", CONTROL, "/run/systemd/notify")
# What one process needs for files of several users; virtiofsd drops the last one itself.
_MANY = "CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER CAP_FSETID CAP_SETGID CAP_SETUID CAP_SETPCAP"


def share_unit(parent: str, tag: str) -> str:
    """Of a VM's unit or debug unit."""
    ending = "-debugshare" if parent.endswith("-debug.service") else "-share"
    return f"{parent.rpartition('-')[0]}{ending}@{tag}.service"


def home_unit(name: str) -> str:
    return f"vmsilo-{name}-home.service"


def home_path(vm: VmConfig) -> str | None:
    if vm.shared_home is False:
        return None
    return f"{HOMES}/{vm.name}" if vm.shared_home is True else vm.shared_home


def render_shares(header: str, vm: VmConfig, parents: Sequence[str], context: UnitContext) -> dict[str, str]:
    """File name -> text; `parents` are the VM's unit and its debug unit."""
    files = {}
    owner, libdir = context.owner, context.paths.libdir
    home = home_path(vm)
    if home is not None:
        files[home_unit(vm.name)] = _render_home(header, vm.name, home, owner, libdir)
    for parent in parents:
        if home is not None:
            text = _render(header, vm, parent, HOME_TAG, context)
            files[share_unit(parent, HOME_TAG)] = (
                text + _render_view(home, libdir) + f"User={owner}\n{SHARE}"
            )
        for share in vm.shared_directories:
            text = _render(header, vm, parent, share.tag, context)
            text += _render_view(share.path, libdir, readonly=share.readonly)
            single = share.uid if share.uid_map is None else share.uid_map[0][1]
            text += _render_user(owner, single, share.gid, share.gid_map, many=share.has_many)
            rights = _render_rights(single, many=share.has_many)
            files[share_unit(parent, share.tag)] = f"{text}{SHARE}{rights}"
    return files


def _render(header: str, vm: VmConfig, parent: str, tag: str, context: UnitContext) -> str:
    restart = "# On SIGTERM virtiofsd ends with 1.\nSuccessExitStatus=1\n"
    if context.vmm == "cloud-hypervisor":
        restart = """\
# virtiofsd ends with its connection; cloud-hypervisor makes a new one when the guest reboots.
Restart=on-success
RestartSec=100ms
FileDescriptorStoreMax=1
"""
    return f"""{header}
[Unit]
Description=Shared directory {tag} of the vmsilo VM {vm.name}
BindsTo={parent}
# It is started while the VM's own start is running, so it can't come after that.
Before={parent}
StartLimitIntervalSec=0

[Service]
Type=notify
# vmsilo-share asks vmsilod whether the directory that it sees is the one that vmsilod has checked, gets the
# listening socket, and becomes virtiofsd.
ExecStart={context.paths.libdir}/bin/vmsilo-share serve {vm.name}
NotifyAccess=main
{restart}# The first process of a process namespace (PrivatePIDs=) ignores a SIGTERM that it does not handle,
# and virtiofsd handles none until it serves. SIGKILL after that loses nothing: the VMM is gone before.
TimeoutStopSec=2
Slice=vmsilo.slice
StandardInput=null
SyslogIdentifier=vmsilo-{vm.name}-share
# Every file that the guest knows costs a descriptor.
LimitNOFILE=262144
# A descriptor keeps the inodes and names of all directories above it in the kernel, so that the number of
# descriptors alone bounds nothing; that memory is charged to the unit. Guest memory that virtiofsd is the
# first to fill is charged to it as well, up to all of it. {ROOM} MiB are for the rest: more than what all
# descriptors take for plain files (some 2 KiB each), since an end by this limit ends the VM.
MemoryMax={(vm.memory_max or vm.memory) + ROOM}M
# It maps the guest's memory, which a core dump would hold.
LimitCORE=0
TasksMax=64
"""


def _render_view(path: str, libdir: str, *, readonly: bool = False) -> str:
    """All of the file system that there is."""
    seen = [*_RUNTIME, *([] if libdir.startswith("/usr/") else [libdir])]
    bind = "BindReadOnlyPaths" if readonly else "BindPaths"
    return f"""\
TemporaryFileSystem=/:ro
BindReadOnlyPaths={" ".join(seen)}
{bind}={_quote(path)}:{INSIDE}
"""


def _render_user(
    owner: str,
    uid: int | None,
    gid: int | None,
    gid_map: tuple[tuple[int, int, int], ...] | None,
    *,
    many: bool,
) -> str:
    if many:
        return "User=root\n"
    if gid is None and gid_map is not None:
        gid = gid_map[0][1]
    user = f"User={owner if uid is None else uid}\n"
    if gid is None and uid is not None:
        return user
    return user if gid is None else f"{user}Group={gid}\n"


def _render_rights(uid: int | None, *, many: bool) -> str:
    """AmbientCapabilities=: else systemd 257 takes CAP_SETUID from root when it filters system calls."""
    if many:
        reason, rights, calls = "uid_map names several users.", _MANY, "@setuid capset"
    elif uid == 0:
        reason = "As root virtiofsd insists on dropping its capabilities itself."
        rights, calls = "CAP_SETPCAP", "capset"
    else:
        return ""
    sets = f"CapabilityBoundingSet={rights}\nAmbientCapabilities={rights}\n"
    return f"# {reason}\n{sets}SystemCallFilter={calls}\n"


def _quote(path: str) -> str:
    """The configuration refuses '"', ':' and the backslash."""
    return '"' + path.replace("%", "%%") + '"'


def _render_home(header: str, name: str, path: str, owner: str, libdir: str) -> str:
    parent = path.rpartition("/")[0] or "/"
    return f"""{header}
[Unit]
Description=Make the shared home of the vmsilo VM {name}
StartLimitIntervalSec=0

[Service]
Type=oneshot
# With the rights of whom it will belong to, and no others.
User={owner}
ExecStart={libdir}/bin/vmsilo-share home {_quote(path)} {TEMPLATE}
UMask=0077
# A start waits for it: see TimeoutStartSec= of the VM's unit.
TimeoutStartSec=80
Slice=vmsilo.slice
StandardInput=null
SyslogIdentifier=vmsilo-{name}-home
LimitCORE=0
ReadWritePaths={_quote("-" + parent)}
{HOME_MAKER}"""
