"""The guest's kernel command line.

Called by the drivers' plan_launch. Everything on it is public: every user of the host reads it in the VMM's
argv and every process of the guest in /proc/cmdline, so no secret is ever put here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsilod.vmm.disks import CRYPT_SERIAL, OVERLAY_SERIAL
from vmsilod.vmm.errors import BadOptionValue, LaunchRefused
from vmsilod.vmm.launch import HOST_CID, HOST_PORT, Console

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmsilod.vmm.launch import Disk, Leases, VmShape

MAX_LENGTH = 2047
"""COMMAND_LINE_SIZE of x86 is 2048 bytes, the terminating zero included (arch/x86/include/asm/setup.h)."""


def plan_kernel_params(
    vm: VmShape, leases: Leases, *, console: Console, vmm_params: Iterable[str] = ()
) -> str:
    """The whole line. The user's own come last, so that they win where the kernel takes the last of two."""
    params = [*vmm_params, *_console_params(console), *_guest_params(vm.name), *_root_params(leases.root)]
    params += _hotplug_params(vm)
    params += _overlay_params(leases)
    params += [f"vmsilo.ifname={_check_param(name)},{mac}" for name, mac in vm.ifnames]
    params += [_check_param(param) for param in vm.kernel_params]
    line = " ".join(params)
    if len(line) > MAX_LENGTH:
        raise LaunchRefused(
            f"the kernel command line of {vm.name} is {len(line)} bytes long, {MAX_LENGTH} are possible",
            "shorten kernel_params",
        )
    return line


def _console_params(console: Console) -> tuple[str, ...]:
    if console is Console.NONE:
        return ("quiet", "loglevel=3")
    if console is Console.STDIO:
        return ("console=ttyS0", "systemd.show_status=yes")
    # tty0 is what /dev/console is until the virtio console is there, which then has all messages from the
    # first on.
    return ("console=tty0", "console=hvc0", "loglevel=5", "systemd.show_status=yes")


def _guest_params(name: str) -> tuple[str, ...]:
    return (
        "panic=-1",  # reboot at once: a panicked guest must not stay
        "random.trust_cpu=on",  # else the first getrandom() of a guest without virtio-rng's module waits
        f"systemd.hostname={_check_param(name)}",
        f"systemd.set_credential=vmm.notify_socket:vsock-stream:{HOST_CID}:{HOST_PORT}",
    )


def _root_params(root: Disk | None) -> tuple[str, ...]:
    if root is None:
        return ()
    device = "/dev/pmem0" if root.pmem else "/dev/vda"
    return (f"vmsilo.root={device}", "ro" if root.readonly else "rw")


def _overlay_params(leases: Leases) -> tuple[str, ...]:
    # Without a word an image's init makes one in the guest's memory.
    words = {OVERLAY_SERIAL: "vmsilo.overlay=disk", CRYPT_SERIAL: "vmsilo.overlay=crypt"}
    return tuple(words[disk.serial] for disk in leases.disks if disk.serial in words)


def _hotplug_params(vm: VmShape) -> tuple[str, ...]:
    # What is plugged in later holds nothing that cannot be moved, so that it can be taken out again.
    return ("memhp_default_state=online_movable",) if vm.memory_max_mib is not None else ()


def _check_param(untrusted_param: str) -> str:
    # crosvm takes ASCII only; a control character would end or hide a parameter for whoever reads the line.
    if not untrusted_param or not all(" " <= char <= "~" for char in untrusted_param):
        raise BadOptionValue(
            f"kernel parameter {untrusted_param!r} is empty or has characters other than printable ASCII"
        )
    return untrusted_param
