"""Checks that need more than one value: between VMs, and against this machine's files and accounts.

Called by the loader after the models. Each function returns the problems that it found and changes
nothing.
"""

from __future__ import annotations

import os
import pwd
import stat
from typing import TYPE_CHECKING

from vmsilod.config import disks
from vmsilod.config.problems import Problem
from vmsilod.vmm import vhost_user
from vmsilod.vmm.launch import VhostUserDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from vmsilod.config.schema import GlobalConfig, PciDevice, UsbDevice, VmFile


def check_account(settings: GlobalConfig, file: str) -> list[Problem]:
    try:
        account = pwd.getpwnam(settings.user)
    except KeyError:
        return [Problem(file, "user", f"this machine has no user '{settings.user}'")]
    if account.pw_uid == 0:
        return [Problem(file, "user", f"'{settings.user}' is root", "name the user who sits at the desktop")]
    return []


def check_files(vm: VmFile, find_origin: Callable[[tuple[str, ...]], str]) -> list[Problem]:
    """Kernel, initramfs and root disk must be there and readable."""
    wanted: list[tuple[tuple[str, ...], str | None, bool]] = [
        (("kernel",), vm.kernel, False),
        (("initramfs",), vm.initramfs, False),
    ]
    if vm.root_disk is not None:
        wanted.append((("root_disk", "path"), vm.root_disk.path, True))
    problems = []
    for key, path, block_device_allowed in wanted:
        if path is not None and (fact := _find_fault(path, block_device_allowed=block_device_allowed)):
            problems.append(Problem(find_origin(key), ".".join(key), fact, vm=vm.name))
    return problems


def _find_fault(path: str, *, block_device_allowed: bool) -> str | None:
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  # an OSError with strerror, for the message
    except OSError as exc:
        return f"'{path}': {exc.strerror}"
    if not stat.S_ISREG(mode) and not (block_device_allowed and stat.S_ISBLK(mode)):
        return f"'{path}' is not a file" + (" or block device" if block_device_allowed else "")
    if not os.access(path, os.R_OK):
        return f"'{path}' cannot be read"
    return None


KEPT = ("shared_home", "persist")
"""What outlives a run."""


def check_disposable(vm: VmFile, find_origin: Callable[[tuple[str, ...]], str]) -> list[Problem]:
    """A VM whose every start is fresh keeps nothing."""
    fact, hint = "is kept from run to run, and disposable = true keeps nothing", "leave one of the two out"
    return [
        Problem(find_origin((key,)), key, fact, hint, vm=vm.name)
        for key in (KEPT if vm.disposable else ())
        if getattr(vm, key)
    ]


def find_missing_template(settings: GlobalConfig, file: str, names: Collection[str]) -> list[Problem]:
    template = settings.disposables.template
    if template is None or template in names:
        return []
    fact = f"there is no VM '{template}' that works"
    return [Problem(file, "disposables.template", fact, "vm-run --here needs one, unless it names another")]


def check_root(vm: VmFile, find_origin: Callable[[tuple[str, ...]], str]) -> list[Problem]:
    """Only a root of its own is a VM's to write."""
    if vm.root_disk is not None or vm.root_disk_readonly:
        return []
    key = "root_disk_readonly"
    fact, hint = "the image's root belongs to all VMs of the image", "set root_disk to a copy of it"
    return [Problem(find_origin((key,)), key, fact, hint, vm=vm.name)]


MEMORY_STEP = 128
"""MiB: what virtio-mem regions of cloud-hypervisor, and memory blocks of an x86 guest, come in."""


def check_vmm(vm: VmFile, vmm: str, find_origin: Callable[[tuple[str, ...]], str]) -> list[Problem]:
    """What the VMM of this VM cannot do; of "auto" it shows when the VM is started."""
    problems = []
    if vm.memory_max is not None:
        fact, hint = _find_memory_fault(vm.memory, vm.memory_max, vmm)
        if fact:
            problems.append(Problem(find_origin(("memory_max",)), "memory_max", fact, hint, vm=vm.name))
    for key in ("pci_devices", "usb_devices", "usb") if vmm == "cloud-hypervisor" else ():
        if getattr(vm, key):
            fact, hint = "not with cloud-hypervisor", 'set vmm to "crosvm" or "qemu"'
            problems.append(Problem(find_origin((key,)), key, fact, hint, vm=vm.name))
    for device in vm.vhost_user if vmm != "auto" else ():
        shape = VhostUserDevice(device.type, device.socket, tuple(device.options.items()))
        if fault := vhost_user.find_fault(shape, vmm):
            fact, hint = fault
            problems.append(Problem(find_origin(("vhost_user",)), "vhost_user", fact, hint, vm=vm.name))
    faults = disks.find_faults(
        vm, root_readonly=vm.root_disk_readonly, own_boot=bool(vm.kernel or vm.initramfs), vmm=vmm
    )
    return problems + disks.check_disks(vm.name, faults, find_origin)


def _find_memory_fault(memory: int, maximum: int, vmm: str) -> tuple[str, str]:
    if maximum <= memory:
        return f"{maximum} is not above memory ({memory})", "leave it out to keep the memory as it is"
    if (maximum - memory) % MEMORY_STEP:
        nearest = memory + -(-(maximum - memory) // MEMORY_STEP) * MEMORY_STEP
        return f"{maximum} is not memory plus a multiple of {MEMORY_STEP}", f"{nearest} is"
    if vmm == "crosvm":
        return "crosvm cannot plug memory in", 'set vmm to "cloud-hypervisor" or "qemu"'
    return "", ""


def find_cycles(depends_on: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """For every VM on a cycle the shortest chain from it back to itself: {"a": ("a", "b", "a")}."""
    cycles: dict[str, tuple[str, ...]] = {}
    for start in depends_on:
        chains: list[tuple[str, ...]] = [(start,)]
        seen = set()
        while chains and start not in cycles:
            following = []
            for chain in chains:
                for name in depends_on.get(chain[-1], ()):
                    if name == start:
                        cycles.setdefault(start, (*chain, start))
                    elif name not in seen:
                        seen.add(name)
                        following.append((*chain, name))
            chains = following
    return cycles


def check_cycles(depends_on: Mapping[str, tuple[str, ...]], files: Mapping[str, str]) -> list[Problem]:
    problems = []
    for name, chain in find_cycles(depends_on).items():
        fact = "names the VM itself" if len(chain) == 2 else "is a circle: " + " -> ".join(chain)
        problems.append(Problem(files[name], "depends_on", fact, vm=name))
    return problems


def find_equal_usb_rules(
    rules: Mapping[str, tuple[UsbDevice, ...]], files: Mapping[str, str]
) -> list[Problem]:
    """Of two VMs with one and the same rule, neither is wrong."""
    problems = []
    seen: dict[UsbDevice, str] = {}
    for name, entries in rules.items():
        for rule in dict.fromkeys(entries):
            first = seen.setdefault(rule, name)
            if first != name:
                ids = ":".join(part for part in (rule.vendor, rule.product, rule.serial) if part)
                fact = f"{ids} is also a rule of {first}"
                hint = "of the two that run the one that was started first gets the device"
                problems.append(Problem(files[name], "usb_devices", fact, hint))
    return problems


def find_dangling(
    depends_on: Mapping[str, tuple[str, ...]], files: Mapping[str, str], broken: frozenset[str]
) -> list[Problem]:
    """A VM that depends on a missing or broken VM is broken too, and so is whoever depends on that one."""
    problems: list[Problem] = []
    lost = set(broken)
    while True:
        found = []
        for name in depends_on:
            if name in lost:
                continue
            for needed in depends_on[name]:
                if needed in depends_on and needed not in lost:
                    continue
                known = needed in depends_on or needed in lost
                fact = f"names {needed}, which " + ("has problems of its own" if known else "does not exist")
                found.append(Problem(files[name], "depends_on", fact, vm=name))
        if not found:
            return problems
        problems += found
        lost |= {problem.vm for problem in found if problem.vm}


def find_shared_devices(
    devices: Mapping[str, tuple[PciDevice, ...]], files: Mapping[str, str]
) -> list[Problem]:
    """A PCI device of two VMs is no mistake: they cannot run at the same time."""
    owners: dict[str, list[str]] = {}
    for name, listed in devices.items():
        for device in listed:
            owners.setdefault(device.path, []).append(name)
    return [
        Problem(
            files[name],
            "pci_devices",
            f"{path} is also listed by {', '.join(other for other in names if other != name)}",
            "only one of them can run at a time",
        )
        for path, names in owners.items()
        for name in (names if len(names) > 1 else ())
    ]
