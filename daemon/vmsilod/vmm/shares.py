"""Shared directories (virtio-fs) as arguments of each VMM.

Called by the drivers' plan_launch; pure. The other end of each is a virtiofsd of vmsilo's own, already
listening; its descriptors come as those of other vhost-user devices do (`vhost_user.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsilod.vmm.escape import quote_cloud_hypervisor, quote_qemu

if TYPE_CHECKING:
    from vmsilod.vmm.launch import Leases, PassedFds

# virtiofsd takes at most this many; crosvm's own default is 32768.
QUEUE_SIZE = 1024


def plan_crosvm(leases: Leases, fds: PassedFds) -> list[str]:
    argv = []
    for share in leases.shares:
        # The tag comes from virtiofsd, which is told it: crosvm asks for the device's configuration.
        argv += ["--vhost-user", f"fs,socket={fds.path(share.fd)},max-queue-size={QUEUE_SIZE}"]
    return argv


def plan_qemu(leases: Leases, fds: PassedFds, bus: str) -> list[str]:
    """`bus`: "pci", or "device" for a microvm's virtio-mmio."""
    argv = []
    for index, share in enumerate(leases.shares):
        argv += ["-chardev", f"socket,id=share{index},fd={fds.number(share.fd)}"]
        options = f"chardev=share{index},tag={quote_qemu(share.tag)},queue-size={QUEUE_SIZE}"
        argv += ["-device", f"vhost-user-fs-{bus},{options}"]
    return argv


def plan_cloud_hypervisor(leases: Leases, fds: PassedFds) -> list[str]:
    argv = []
    for share in leases.shares:
        # It connects by itself, and again when the guest reboots.
        words = [f"tag={quote_cloud_hypervisor(share.tag)}", f"socket={fds.path(share.fd)}"]
        argv += ["--fs", ",".join([*words, "num_queues=1", f"queue_size={QUEUE_SIZE}"])]
    return argv
