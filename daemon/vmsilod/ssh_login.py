"""One login by ssh into a running VM: its keys from disk, its connection from the relay.

Called by the lifecycle for a caller whom polkit has let through. It starts nothing, keeps nothing and speaks
no ssh: what the guest's sshd says is read by the caller's client alone.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmsilod import loop
from vmsilod.errors import NoSsh, NotRunning, VmsiloError
from vmsilod.resources import ssh_keys

if TYPE_CHECKING:
    from vmsilod.bus.requests import SshRequest
    from vmsilod.registry import Vm
    from vmsilod.relay_client import RelayClient

SSH_PORT = 22
UNREACHABLE = "agent-unreachable"  # the relay's code for a port that does not answer


async def open_login(vm: Vm, request: SshRequest, relay: RelayClient) -> tuple[int, int, str, str]:
    """(connection, private key, login, host key); the caller owns the two descriptors."""
    started, record = vm.started, vm.record
    if started is None or record is None:
        raise NotRunning(f"VM '{vm.name}' stopped meanwhile", "try again")
    if not started.ssh:
        raise NoSsh(f"VM '{vm.name}' was started with ssh = false", f"vm-run {vm.name}")
    key = "root" if request.root else "user"
    door = await loop.in_worker(ssh_keys.open_door, vm.name, key, request.uid)
    try:
        stream = await relay.dial(vm.name, SSH_PORT)
    except VmsiloError as error:
        os.close(door.key_fd)
        if error.code != UNREACHABLE:
            raise
        raise NoSsh(
            error.message, "its image needs openssh-server: vmsilo image build, then restart the VM"
        ) from error
    except BaseException:
        os.close(door.key_fd)
        raise
    return stream, door.key_fd, "root" if request.root else record.login, door.host_key
