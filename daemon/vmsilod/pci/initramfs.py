"""What an initramfs has to know of isolated PCI devices: its files, and a stamp that tells whether it does.

Called by vmsilo-pci-claim when initramfs-tools or dracut builds one, and by `vmsilo check`. An initramfs
without isolated devices gets nothing.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from vmsilod.errors import Failed
from vmsilod.pci.topology import read_topology

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmsilod.pci.roots import Roots

STAMPS = Path("/var/lib/vmsilo/initramfs")
HOOKS = (
    Path("/usr/share/initramfs-tools/hooks/vmsilo-pci"),
    Path("/usr/lib/dracut/modules.d/90vmsilo-pci/module-setup.sh"),
)
RULES = "etc/udev/rules.d/40-vmsilo-pci.rules"
MODPROBE = "etc/modprobe.d/vmsilo-pci.conf"
MODPROBE_SECONDS = 10
PARAMETER = "vmsilo.pci"  # of the kernel; "off" leaves all devices to the host's drivers


def render_rules(models: Mapping[str, tuple[str, str]]) -> str:
    """Every event of a PCI device sets all of them: one driver's module serves many devices, and the event
    that loads it may come before that of the isolated one. udev loads modules after it has set attributes.

    `models`: address -> (vendor, device). Another device that got the address since is left alone. The
    parameter is imported by a rule of its own, because IMPORT matches only where it is given.
    """
    lines = [
        f'ACTION=="add", SUBSYSTEM=="pci", ENV{{{PARAMETER}}}!="off", '
        f'TEST=="[pci/{address}]driver_override", '
        f'ATTR{{[pci/{address}]vendor}}=="0x{vendor}", ATTR{{[pci/{address}]device}}=="0x{device}", '
        f'ATTR{{[pci/{address}]driver_override}}="vfio-pci"\n'
        for address, (vendor, device) in models.items()
    ]
    return "".join(
        [
            "# Isolated PCI devices, when this initramfs was built.\n",
            f'ACTION=="add", SUBSYSTEM=="pci", IMPORT{{cmdline}}="{PARAMETER}"\n',
            *lines,
        ]
    )


def find_models(addresses: Sequence[str], roots: Roots) -> dict[str, tuple[str, str]]:
    """Of the devices that are there."""
    functions = read_topology(roots).functions
    return {
        address: (functions[address].vendor, functions[address].device)
        for address in addresses
        if address in functions
    }


def render_modprobe(modules: Sequence[str]) -> str:
    """vfio-pci is there before a driver that would have taken the device."""
    lines = [f"softdep {module} pre: vfio-pci\n" for module in modules]
    return "".join(["# The drivers of isolated PCI devices.\n", *lines])


def find_modules(addresses: Sequence[str], roots: Roots) -> list[str]:
    """The modules that udev would load for these devices, as far as this machine has them."""
    modules: list[str] = []
    for address in addresses:
        try:
            alias = (roots.function(address) / "modalias").read_text().strip()
            argv = ["modprobe", "--resolve-alias", "--", alias]
            done = subprocess.run(
                argv, capture_output=True, text=True, check=False, timeout=MODPROBE_SECONDS
            )
        except (OSError, subprocess.SubprocessError):
            continue
        modules += [name for name in done.stdout.split() if name.replace("_", "").isalnum()]
    return list(dict.fromkeys(name for name in modules if name != "vfio_pci"))


def write_initramfs(
    addresses: Sequence[str], folder: Path, kernel: str, roots: Roots, stamps: Path = STAMPS
) -> None:
    """Into an initramfs under construction for the kernel release `kernel`. The stamp has what a rule is
    for: a device that is not there now has none.
    """
    models = find_models(addresses, roots)
    files = {RULES: render_rules(models), MODPROBE: render_modprobe(find_modules(addresses, roots))}
    try:
        for name, text in files.items() if addresses else ():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    except OSError as error:
        raise Failed(f"cannot write into the initramfs at {folder}: {error.strerror}") from error
    write_stamp(tuple(models), kernel, stamps)


def write_stamp(addresses: Sequence[str], kernel: str, stamps: Path = STAMPS) -> None:
    path = stamps / kernel
    try:
        if addresses:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{address}\n" for address in sorted(addresses)))
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise Failed(f"cannot write {path}: {error.strerror}") from error


def find_stale(
    addresses: Sequence[str], stamps: Path = STAMPS, hooks: Sequence[Path] = HOOKS
) -> tuple[str, str] | None:
    """Fact and hint if the running kernel's initramfs is for other devices; None: fine, or unknown."""
    kernel = os.uname().release
    try:
        built = (stamps / kernel).read_text().split()
    except OSError:
        built = []
    if built == sorted(addresses) or not any(hook.exists() for hook in hooks):
        return None
    known, wanted = (", ".join(devices) or "none" for devices in (built, sorted(addresses)))
    return (
        f"the initramfs of {kernel} was built to isolate {known}, and the configuration says {wanted}",
        "update-initramfs -u (Debian) or dracut --force (Fedora)",
    )
