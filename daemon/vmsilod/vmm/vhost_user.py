"""vhost-user devices of the configuration as arguments of each VMM.

Called by the drivers' plan_launch, and by the configuration's checks for the names of the types. Pure. The
options of a device go to the VMM as they are configured: only what could end the value, and the keys that
vmsilo sets itself, are refused.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vmsilod.vmm.errors import BadOptionValue, LaunchRefused
from vmsilod.vmm.escape import quote_cloud_hypervisor, quote_crosvm, quote_qemu

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vmsilod.vmm.launch import Leases, OptionValue, PassedFds, VhostUserDevice, VmShape

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
# The VMMs' names for the same thing.
_ALIASES = {"blk": "block", "snd": "sound"}

# devices/src/virtio/mod.rs DeviceType, without vsock, balloon and iommu, which a VM has once or never.
_CROSVM_NAMES = (
    *("net", "block", "console", "rng", "scsi", "9p", "gpu", "input", "sound", "fs", "pmem"),
    *("mac80211-hwsim", "video-encoder", "video-decoder", "scmi", "wl", "tpm", "pvclock", "media"),
)
_CROSVM = {name: name for name in _CROSVM_NAMES}
# `-device help` of QEMU 10.0; Debian 12's 7.2 lacks input, snd and scmi.
_QEMU = {
    "net": "virtio-net-pci",
    "block": "vhost-user-blk-pci",
    "sound": "vhost-user-snd-pci",
    **{
        name: f"vhost-user-{name}-pci"
        for name in ("fs", "gpio", "gpu", "i2c", "input", "rng", "scmi", "scsi")
    },
}
# Those with an option of their own, and names that --generic-vhost-user knows (vmm/src/config.rs).
_CLOUD_HYPERVISOR = {
    "fs": "--fs",
    "net": "--net",
    "block": "--disk",
    **dict.fromkeys(
        ("9p", "can", "console", "crypto", "gpio", "i2c", "input", "media", "rng", "scmi", "scsi", "sound"),
        "--generic-vhost-user",
    ),
}
_TYPES: Mapping[str, Mapping[str, str]] = {
    "crosvm": _CROSVM,
    "qemu": _QEMU,
    "cloud-hypervisor": _CLOUD_HYPERVISOR,
}
_OWN_KEYS = {
    "crosvm": frozenset({"type", "socket"}),
    "qemu": frozenset({"chardev", "netdev", "driver", "id"}),
    "cloud-hypervisor": frozenset(
        {"vhost_user", "vhost_mode", "socket", "path", "fd", "tap", "device_type", "virtio_id"}
    ),
}
# Keys of -netdev vhost-user; the others of a net device are those of -device.
_QEMU_NETDEV_KEYS = frozenset({"queues", "vhostforce"})


def list_types(vmm: str) -> tuple[str, ...]:
    return tuple(sorted(_TYPES[vmm]))


def find_type(vmm: str, name: str) -> str | None:
    """What the VMM calls a device type; None: it does not know it."""
    return _TYPES[vmm].get(_ALIASES.get(name, name))


def find_fault(device: VhostUserDevice, vmm: str) -> tuple[str, str] | None:
    """Fact and hint where this VMM cannot have such a device, as far as that shows without asking it."""
    if find_type(vmm, device.type) is None:
        return (
            f"{vmm} has no vhost-user device of type '{device.type}'",
            f"its types are {', '.join(list_types(vmm))}",
        )
    for key, _ in device.options:
        if key in _OWN_KEYS[vmm]:
            return f"'{key}' of a vhost-user device is set by vmsilo itself", "leave it out"
    return None


def plan_crosvm(vm: VmShape, leases: Leases, fds: PassedFds) -> list[str]:
    argv = []
    for device, fd in _pairs(vm, leases, "crosvm"):
        # A connected descriptor: crosvm takes the number out of the path.
        words = [_CROSVM[_ALIASES.get(device.type, device.type)], f"socket={fds.path(fd)}"]
        words += _format(device, quote_crosvm, ("true", "false"))
        argv += ["--vhost-user", ",".join(words)]
    return argv


def plan_qemu(vm: VmShape, leases: Leases, fds: PassedFds) -> list[str]:
    argv = []
    for index, (device, fd) in enumerate(_pairs(vm, leases, "qemu")):
        name = f"vhost-user{index}"
        argv += ["-chardev", f"socket,id={name},fd={fds.number(fd)}"]
        model = find_type("qemu", device.type)
        words = _format(device, quote_qemu, ("on", "off"))
        if device.type == "net":
            of_netdev = [word for word in words if word.partition("=")[0] in _QEMU_NETDEV_KEYS]
            argv += ["-netdev", ",".join(["vhost-user", f"id=net-{name}", f"chardev={name}", *of_netdev])]
            argv += [
                "-device",
                ",".join([f"{model},netdev=net-{name}", *(w for w in words if w not in of_netdev)]),
            ]
        else:
            argv += ["-device", ",".join([f"{model},chardev={name}", *words])]
    return argv


def plan_cloud_hypervisor(vm: VmShape, leases: Leases, fds: PassedFds) -> list[str]:
    argv = []
    for device, fd in _pairs(vm, leases, "cloud-hypervisor"):
        name = _ALIASES.get(device.type, device.type)
        option = _CLOUD_HYPERVISOR[name]
        first = {"--net": ["vhost_user=on"], "--disk": ["vhost_user=on"], "--fs": []}
        words = first.get(option, [f"device_type={name}"])
        # It connects by itself, and again when the guest reboots.
        words = [*words, f"socket={fds.path(fd)}", *_format(device, quote_cloud_hypervisor, ("on", "off"))]
        argv += [option, ",".join(words)]
    return argv


def _pairs(vm: VmShape, leases: Leases, vmm: str) -> Sequence[tuple[VhostUserDevice, int]]:
    for device in vm.vhost_user:
        if fault := find_fault(device, vmm):
            fact, hint = fault
            raise LaunchRefused(f"{vm.name}: {fact}", hint)
    return list(zip(vm.vhost_user, leases.vhost_user_fds, strict=True))


def _format(device: VhostUserDevice, quote: Callable[[str], str], booleans: tuple[str, str]) -> list[str]:
    words = []
    for key, value in device.options:
        if not _KEY.fullmatch(key):
            raise BadOptionValue(f"{key!r} is not the name of an option of a vhost-user device")
        words.append(f"{key}={_format_value(value, quote, booleans)}")
    return words


def _format_value(value: OptionValue, quote: Callable[[str], str], booleans: tuple[str, str]) -> str:
    if isinstance(value, bool):
        return booleans[0] if value else booleans[1]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, tuple):
        return f"[{','.join(str(number) for number in value)}]"
    return quote(value)
