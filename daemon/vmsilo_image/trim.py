"""What a vmsilo guest leaves out of a Debian boot. Called by rootfs.

Each line here is a process, a mount or a module that a VM with a new root for each boot does not need. On an
emulated CPU a process costs more than 100 ms before it does anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .tree import resolve_inside, write_file, write_link

if TYPE_CHECKING:
    from pathlib import Path

UNITS = "/etc/systemd/system"
MASKED = (
    # The root is replaced as a whole: nothing is upgraded, backed up, trimmed or rebuilt in it.
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer"),
    *("e2scrub_all.timer", "e2scrub_reap.service", "ldconfig.service", "systemd-firstboot.service"),
    *("systemd-hwdb-update.service", "systemd-journal-catalog-update.service", "systemd-sysusers.service"),
    *("systemd-update-done.service", "systemd-machine-id-commit.service"),
    # /, /run and the API file systems are mounted as they should be when systemd starts.
    "systemd-remount-fs.service",
    # The overlay forgets, and virtio-rng is there from the initrd on.
    *("systemd-random-seed.service", "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service"),
    *("systemd-journal-flush.service", "systemd-pstore.service", "systemd-hibernate-clear.service"),
    # The only login is vmsilo-console-login.service: no other prompts, and no moment at which logins begin
    # to be allowed.
    *("getty@tty1.service", "getty.target", "systemd-user-sessions.service"),
    *("systemd-ask-password-console.path", "systemd-ask-password-wall.path"),
    # File systems that programs of a desktop do not use. /dev/mqueue and /dev/shm stay.
    *(
        "dev-hugepages.mount",
        "sys-kernel-debug.mount",
        "sys-kernel-tracing.mount",
        "sys-kernel-config.mount",
    ),
    *("sys-fs-fuse-connections.mount", "proc-sys-fs-binfmt_misc.automount", "systemd-binfmt.service"),
    # There is no TPM and no measured boot, and no images are put over /usr.
    *("systemd-pcrmachine.service", "systemd-pcrphase-sysinit.service", "systemd-pcrphase.service"),
    *("systemd-tpm2-setup-early.service", "systemd-tpm2-setup.service", "systemd-pcrextend.socket"),
    *("systemd-pcrlock.socket", "systemd-sysext.socket", "systemd-creds.socket", "systemd-initctl.socket"),
    # udev loads what there is a device for; its static nodes are a file since the image was built.
    *("modprobe@.service", "kmod-static-nodes.service", "systemd-tmpfiles-setup-dev-early.service"),
    "systemd-udev-load-credentials.service",
    # Nothing is kept over a boot, and the host says by files what a command line would.
    *("systemd-networkd-persistent-storage.service", "systemd-network-generator.service"),
    # sshd is there for the host, over vsock: not on a network of the VM, not for the guest's own users.
    *("ssh.service", "ssh.socket", "sshd.service", "sshd-unix-local.socket", "sshd-keygen.service"),
)
# Each is a process at every boot. systemd-debug-generator stays: systemd.debug_shell=ttyS0 is the way to a
# shell.
GENERATORS = (
    *("cryptsetup", "getty", "gpt-auto", "hibernate-resume", "integritysetup", "rc-local", "run"),
    *("system-update", "sysv", "tpm2", "veritysetup"),
)
USER_GENERATORS = ("xdg-autostart",)
TMPFILES = ("systemd-nologin.conf", "systemd-pstore.conf")

# Coldplug of the buses that VMMs put devices on, and of nodes whose mode or links udev sets. The rest of
# some 300 devices (CPUs, memory, consoles, ACPI and platform parts) needs no driver and no rule. What
# appears later announces itself and is never filtered.
COLDPLUGGED = (
    *("block", "drm", "graphics", "hid", "hidraw", "i2c", "input", "misc", "net", "nvme", "pci", "rtc"),
    *("scsi", "serio", "sound", "usb", "video4linux", "virtio", "virtio-ports"),
)
TRIGGER = """\
[Service]
ExecStart=
ExecStart=-udevadm trigger --type=devices --action=add {matches}
"""
# The CPU's own features ask for these: no VM is to start inside a compartment.
MODPROBE = b"blacklist kvm_amd\nblacklist kvm_intel\n"
NODES = "/etc/tmpfiles.d/static-nodes.conf"


def trim_root(root: Path, release: str) -> None:
    for unit in MASKED:
        write_link(root, f"{UNITS}/{unit}", "/dev/null")
    for name in GENERATORS:
        write_link(root, f"/etc/systemd/system-generators/systemd-{name}-generator", "/dev/null")
    for name in USER_GENERATORS:
        write_link(root, f"/etc/systemd/user-generators/systemd-{name}-generator", "/dev/null")
    for name in TMPFILES:
        write_link(root, f"/etc/tmpfiles.d/{name}", "/dev/null")
    matches = " ".join(f"--subsystem-match={name}" for name in COLDPLUGGED)
    drop_in = f"{UNITS}/systemd-udev-trigger.service.d/vmsilo.conf"
    write_file(root, drop_in, TRIGGER.format(matches=matches).encode())
    write_file(root, "/etc/modprobe.d/vmsilo.conf", MODPROBE)
    write_static_nodes(root, release)
    drop_empty_modules(root)


def write_static_nodes(root: Path, release: str) -> None:
    """/dev/net/tun, /dev/snd/seq and such, which must be there for their module to be loaded."""
    devname = resolve_inside(root, f"/lib/modules/{release}/modules.devname")
    if devname.is_file():
        write_file(root, NODES, plan_static_nodes(devname.read_text()).encode())


def plan_static_nodes(devname: str) -> str:
    """tmpfiles.d lines for modules.devname lines `MODULE NODE cMAJOR:MINOR`, as `kmod static-nodes` has
    them."""
    lines = []
    for line in devname.splitlines():
        fields = line.split()
        if line.startswith("#") or len(fields) != 3 or fields[2][:1] not in ("b", "c"):
            continue
        _, node, kind = fields
        if "/" in node:
            lines.append(f"d /dev/{node.rpartition('/')[0]} 0755 - - -")
        lines.append(f"{kind[0]}! /dev/{node} 0600 - - - {kind[1:]}")
    return "".join(f"{line}\n" for line in dict.fromkeys(lines))


def drop_empty_modules(root: Path) -> None:
    """Debian links /etc/modules here, which alone makes systemd-modules-load run."""
    link = resolve_inside(root, "/etc") / "modules-load.d/modules.conf"
    listed = resolve_inside(root, "/etc/modules")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    if link.is_symlink() and not any(line.strip() and not line.startswith("#") for line in lines):
        link.unlink()
