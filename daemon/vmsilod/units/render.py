"""The text of a VM's systemd units, as a pure function of its configuration and of what this machine has.

Called by the part of vmsilod that writes /run/systemd/system; never writes, never talks to systemd. The
texts depend on the arguments alone, so that an unchanged unit is recognised by comparing.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from vmsilod.units.forward import render_forwards
from vmsilod.units.hardening import (
    HELPER,
    VMM_EVERY,
    VMM_INET,
    VMM_LIBUSB,
    VMM_SANDBOXED_BY_BOTH,
    VMM_SANDBOXED_BY_ITSELF,
    VMM_SANDBOXED_BY_SYSTEMD,
)
from vmsilod.units.shares import render_shares

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmsilod.config import VmConfig

VMS_TARGET = "vmsilo-vms.target"
DAEMONS_TARGET = "vmsilo-daemons.target"
RUN_DIRECTORY = "/run/vmsilo"
# Longest user name that systemd accepts (utmp's 32 bytes with the final NUL).
_USER_NAME_MAX = 31
# Seconds that ExecStop= gets beyond the guest's own deadline, to force the VMM out and to answer.
_STOP_MARGIN = 10
# Seconds for `prepare`: the unit is started when the VMM is executed, not when the guest is ready.
_PREPARE_TIMEOUT = 90
# Bytes: below the kernel's SKB_WITH_OVERHEAD(32 KiB), above which its vsock packets are not linear.
_HYBRID_BUFFER = 28 * 1024
PCI_MODULE = "modprobe@vfio_pci.service"
_ACCOUNT = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_PATH = re.compile(r"/[A-Za-z0-9_./+-]*")


Vmm = Literal["crosvm", "qemu", "cloud-hypervisor"]
_SANDBOXES: dict[Vmm, str] = {
    "crosvm": VMM_SANDBOXED_BY_ITSELF,
    "qemu": VMM_SANDBOXED_BY_SYSTEMD,
    "cloud-hypervisor": VMM_SANDBOXED_BY_BOTH,
}


@dataclass(frozen=True)
class UnitPaths:
    """Where the programs are that the units start."""

    libdir: str = "/usr/lib/vmsilo"
    vhost_device_vsock: str = "/usr/bin/vhost-device-vsock"


@dataclass(frozen=True)
class UnitContext:
    """What the units depend on beside the configuration.

    vmm: what "auto" came to; groups: groups that exist on this machine; hybrid_cid: the guest's CID where
    hybrid vsock is used (3: each such guest has a vsock of its own), None with the kernel's vsock.
    """

    owner: str
    vmm: Vmm
    groups: frozenset[str] = frozenset()
    hybrid_cid: int | None = None
    paths: UnitPaths = field(default_factory=UnitPaths)


@dataclass(frozen=True)
class RenderedUnits:
    """File name -> text, and link -> target; all names are relative to the unit directory."""

    files: Mapping[str, str]
    links: Mapping[str, str]


def render_units(vm: VmConfig, context: UnitContext) -> RenderedUnits:
    """All units of one VM. Raises ValueError for a value that could end its line in a unit file."""
    _check_context(context)
    files = {
        socket_unit(vm.name): _render_socket(vm, context),
        vm_unit(vm.name): _render_vm(vm, context),
        debug_unit(vm.name): _render_debug(vm, context),
    }
    if context.hybrid_cid is not None:
        for parent in (vm_unit(vm.name), debug_unit(vm.name)):
            files[vsock_unit(parent)] = _render_vsock(vm, context, parent)
    parents = (vm_unit(vm.name), debug_unit(vm.name))
    files |= render_forwards(_render_header(vm), vm, parents, context.paths.libdir)
    files |= render_shares(_render_header(vm), vm, parents, context)
    links = {}
    if vm.auto_start:
        links[f"{VMS_TARGET}.wants/{vm_unit(vm.name)}"] = f"../{vm_unit(vm.name)}"
    return RenderedUnits(files, links)


def socket_unit(name: str) -> str:
    return f"vmsilo-{name}.socket"


def vm_unit(name: str) -> str:
    return f"vmsilo-{name}-vm.service"


def debug_unit(name: str) -> str:
    return f"vmsilo-{name}-debug.service"


def vsock_unit(parent: str) -> str:
    """The vsock device of a VM's unit or debug unit; no other unit of any VM ends in these letters."""
    ending = "-debugvsock.service" if parent.endswith("-debug.service") else "-vsock.service"
    return parent.rpartition("-")[0] + ending


def command_socket(name: str) -> str:
    return f"{RUN_DIRECTORY}/{name}-command.socket"


def vsock_directory(name: str) -> str:
    return f"{RUN_DIRECTORY}/vm/{name}/vsock"


def user_name(name: str) -> str:
    """The dynamic user of a VM; a name that is too long is hashed, under a prefix that no other has."""
    plain = f"vmsilo-vm-{name}"
    if len(plain) <= _USER_NAME_MAX:
        return plain
    return f"vmsilo-vx-{hashlib.sha256(name.encode('ascii')).hexdigest()[:20]}"


def _check_context(context: UnitContext) -> None:
    # A line feed would begin a new setting, '%' is a specifier, and a space or quote splits a command line.
    if not _ACCOUNT.fullmatch(context.owner):
        raise ValueError(f"{context.owner!r} cannot be a user name in a unit file")
    for path in (context.paths.libdir, context.paths.vhost_device_vsock):
        if not _PATH.fullmatch(path):
            raise ValueError(f"{path!r} cannot be a path in a unit file")
    if context.hybrid_cid is not None and not 3 <= context.hybrid_cid < 2**32 - 1:
        raise ValueError(f"{context.hybrid_cid} cannot be a guest's CID")


def _render_header(vm: VmConfig) -> str:
    source = vm.sources[0] if vm.sources else f"vms.d/{vm.name}.toml"
    if not source.isprintable():
        raise ValueError(f"{source!r} cannot be named in a unit file")
    return f"# Generated by vmsilod from {source}; changes here are lost. Use `systemctl edit`.\n"


def _render_socket(vm: VmConfig, context: UnitContext) -> str:
    return f"""{_render_header(vm)}
[Unit]
Description=Commands for the vmsilo VM {vm.name}

[Socket]
ListenSequentialPacket={command_socket(vm.name)}
FileDescriptorName=command
Service={vm_unit(vm.name)}
# Whoever can connect runs commands in the VM; vmsilo-relayd checks the peer's uid again.
SocketUser={context.owner}
SocketGroup=root
SocketMode=0600
Backlog=1024
# When a start fails, the clients that wait for it are hung up. Without this their connections would stay
# in the queue and trigger the next start at once, for ever.
FlushPending=yes
# Each start takes a client and the queue is emptied after it, so there is no loop for the limit to
# break; but the limit would leave the socket dead after a script's twenty quick attempts on a VM that
# cannot start.
TriggerLimitIntervalSec=0
# A path without a listener would look like a VM that refuses.
RemoveOnStop=yes
"""


def _render_vm(vm: VmConfig, context: UnitContext) -> str:
    daemons = (
        "vmsilod.socket vmsilo-relayd.socket vmsilo-consoled.socket"
        f" vmsilod.service vmsilo-relayd.service {DAEMONS_TARGET}"
    )
    needed = " ".join(vm_unit(name) for name in vm.depends_on)
    wants = f"# depends_on\nWants={needed}\nAfter={needed}\n" if needed else ""
    wants += _render_pci_order(vm)
    return f"""{_render_header(vm)}
[Unit]
Description=vmsilo VM {vm.name}
# A start that did not come through the socket gets the listener too: Sockets= below passes it, this
# makes it exist.
Requires={socket_unit(vm.name)}
After={socket_unit(vm.name)}
# Wants=, not Requires=: the VM outlives a stop or crash of either daemon. The target comes after the
# daemons, so that at shutdown the VM stops first, while they can still ask the guest to.
Wants={daemons}
After=vmsilod.socket vmsilo-relayd.socket {DAEMONS_TARGET}
{wants}# A person asks for starts, each by a command; a limit would only turn the next command away.
StartLimitIntervalSec=0

[Service]
Sockets={socket_unit(vm.name)}
{_render_restart(context)}{_render_service(vm, context)}"""


def _render_debug(vm: VmConfig, context: UnitContext) -> str:
    return f"""{_render_header(vm)}
[Unit]
Description=vmsilo VM {vm.name} with its console on the terminal of vm-start-debug
# The same VM cannot run twice, and no command may start it while somebody looks at its boot.
Conflicts={vm_unit(vm.name)} {socket_unit(vm.name)}
Wants={DAEMONS_TARGET}
After={vm_unit(vm.name)} {socket_unit(vm.name)} {DAEMONS_TARGET}
{_render_pci_order(vm)}StartLimitIntervalSec=0

[Service]
Restart=no
{_render_service(vm, context)}"""


def _render_service(vm: VmConfig, context: UnitContext) -> str:
    """What both services of a VM have in common."""
    launch = f"{context.paths.libdir}/bin/vmsilo-launch"
    return f"""Type=notify
# vmsilo-launch reports and then becomes the VMM; no child of the VMM may speak for it.
NotifyAccess=main
ExecStart={launch} start {vm.name}
ExecStop={launch} stop {vm.name}
# Until the VMM is executed; the guest's readiness has a timeout of its own (start_timeout).
TimeoutStartSec={_PREPARE_TIMEOUT}
# stop_timeout for the guest, then {_STOP_MARGIN} s to make the VMM leave.
TimeoutStopSec={vm.stop_timeout + _STOP_MARGIN}
Slice=vmsilo.slice
# The VMM may have child processes (crosvm: one per device) that are not told when it dies. None may be left.
KillMode=control-group
# Half a VM is no VM: when the kernel needs the memory, all of it goes at once.
OOMPolicy=kill

DynamicUser=yes
User={user_name(vm.name)}
{_render_groups(context)}StandardInput=null
SyslogIdentifier=vmsilo-{vm.name}
{_render_writable(context)}\
# One process holds the descriptors of all devices; crosvm refuses less than 4096, its GPU device wants
# 32768.
LimitNOFILE=65536
# A core dump would hold the guest's memory.
LimitCORE=0
{_render_pci(vm)}
{VMM_EVERY}
{_SANDBOXES[context.vmm]}{VMM_LIBUSB if vm.wants_usb and context.vmm == "qemu" else ""}\
{VMM_INET if vm.network.interfaces and context.vmm == "crosvm" else ""}"""


def _render_pci(vm: VmConfig) -> str:
    if not vm.pci_devices:
        return ""
    return """\
# pci_devices: a VFIO group's node belongs to this VM's uid while it runs, so the others stay closed to it.
DeviceAllow=/dev/vfio/vfio rw
DeviceAllow=char-vfio rw
# The device reaches all of the guest's memory, which is therefore locked.
LimitMEMLOCK=infinity
"""


def _render_pci_order(vm: VmConfig) -> str:
    if not vm.pci_devices:
        return ""
    return f"""\
# pci_devices: systemd needs the device numbers when it makes the device policy.
Wants={PCI_MODULE}
After={PCI_MODULE}
"""


def _render_restart(context: UnitContext) -> str:
    if context.vmm != "crosvm":
        return "Restart=no\n"
    return """Restart=no
# Guest reset: crosvm exits with 32 and never reboots the guest by itself.
RestartForceExitStatus=32
# One that meets a stop is no failure.
SuccessExitStatus=32
RestartSec=500ms
"""


def _render_writable(context: UnitContext) -> str:
    if context.vmm != "cloud-hypervisor":
        return "UMask=0077\n"
    return f"""# It makes the socket of its own vsock, to which vmsilo-relayd, in the directory's group,
# connects; the directory (0770) keeps all others out. That one does not exist yet, so what is
# writable here is the place where it will be, which belongs to root.
UMask=0000
ReadWritePaths={RUN_DIRECTORY}/vm
"""


def _render_groups(context: UnitContext) -> str:
    if "kvm" not in context.groups:
        return ""
    return "# /dev/kvm belongs to this group.\nSupplementaryGroups=kvm\n"


def _render_vsock(vm: VmConfig, context: UnitContext, parent: str) -> str:
    directory = vsock_directory(vm.name)
    program = context.paths.vhost_device_vsock
    return f"""{_render_header(vm)}
[Unit]
Description=vsock of the vmsilo VM {vm.name}
BindsTo={parent}
# It is started while the VM's own start is running, so it can't come after that; and at a stop it must
# outlast the VMM, which needs it to ask the guest. Before= says both.
Before={parent}
# A failed one is not kept: the VM's state tells the story.
CollectMode=inactive-or-failed
StartLimitIntervalSec=0

[Service]
Type=exec
# The device (0.3.0 and before) loses each packet that comes in several parts, as newer guest kernels send
# those above 32 KiB, and the connection hangs. A smaller buffer keeps packets small.
ExecStart={program} --guest-cid {context.hybrid_cid} --tx-buffer-size {_HYBRID_BUFFER} \\
    --socket {directory}/vhost --uds-path {directory}/vsock
Slice=vmsilo.slice

# The VM's own user: the VMM connects to `vhost`, and nobody else may.
DynamicUser=yes
User={user_name(vm.name)}
StandardInput=null
SyslogIdentifier=vmsilo-{vm.name}-vsock
# vmsilo-relayd, in the directory's group, connects to `vsock`; the directory (0770) keeps all others out.
UMask=0000
ReadWritePaths={directory}
# It maps the guest's memory, which a core dump would hold.
LimitCORE=0
{HELPER}"""
