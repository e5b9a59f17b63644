"""The text of the unit that copies a VM's forwarded ports, as a pure function.

Called by render.py for each VM; empty for one that forwards nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsilod.units.hardening import HELPER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsilod.config import VmConfig


def render_forwards(header: str, vm: VmConfig, parents: Sequence[str], libdir: str) -> dict[str, str]:
    """File name -> text; `parents` are the VM's unit and its debug unit."""
    forwards = vm.network.forward_ports
    if not forwards:
        return {}
    targets = sorted({str(forward.host_address) for forward in forwards if forward.side == "guest"})
    return {forward_unit(parent): _render(header, vm.name, parent, libdir, targets) for parent in parents}


def forward_unit(parent: str) -> str:
    """Of a VM's unit or debug unit; no other unit of any VM ends in these letters."""
    ending = "-debugforward.service" if parent.endswith("-debug.service") else "-forward.service"
    return parent.rpartition("-")[0] + ending


def _render(header: str, name: str, parent: str, libdir: str, targets: Sequence[str]) -> str:
    return f"""{header}
[Unit]
Description=Forwarded ports of the vmsilo VM {name}
BindsTo={parent}
# It is started while the VM's own start is running, so it can't come after that.
Before={parent}
# A failed one is not kept: the VM's state tells the story.
CollectMode=inactive-or-failed
# However often it crashes: the VM lives on.
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={libdir}/bin/vmsilo-forward {name}
Restart=always
RestartSec=200ms
# Its listeners stay with the manager over a crash: nobody takes the ports, and no connection is refused.
NotifyAccess=main
FileDescriptorStoreMax=64
Slice=vmsilo.slice

# A user of its own: it gets bytes from the guest and from whoever may connect to the host's ports.
DynamicUser=yes
StandardInput=null
SyslogIdentifier=vmsilo-{name}-forward
LimitNOFILE=1024
LimitCORE=0
MemoryMax=128M
TasksMax=4
{HELPER}{_render_network(targets)}"""


def _render_network(targets: Sequence[str]) -> str:
    """Listeners and connections to the guest come as open descriptors, for which no network is needed."""
    if not targets:
        return ""
    return f"""\
# Forwards from the guest: connections to these addresses of the host, and to nowhere else.
PrivateNetwork=no
RestrictAddressFamilies=AF_INET AF_INET6
SocketBindDeny=any
IPAddressDeny=any
IPAddressAllow={" ".join(targets)}
"""
