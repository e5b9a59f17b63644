"""The cached parts of the lab, a whole virtual host: its Debian root with a kernel, vmsilo installed in it,
its disk.

Called by the lab's programs, as root. Kept and keyed like the container host's layers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hosts import layers
from hosts.layers import CACHE, HOST_PACKAGES, digest, making, mounted, run_logged, say

if TYPE_CHECKING:
    from pathlib import Path

LAB_PACKAGES = [
    *("linux-image-amd64", "initramfs-tools", "zstd", "kmod", "udev", "e2fsprogs"),
    *("openssh-server", "openssh-client", "virtiofsd", "pciutils", "usbutils", "python3-pytest", "jq"),
]
BENCH_PACKAGES = [
    *("libvirt-daemon-system", "libvirt-daemon-driver-qemu", "libvirt-clients"),
]
# Debian 13 does not build systemd-vmspawn. The newer one runs there with its own library beside it.
VMSPAWN_PACKAGES = ("systemd-container", "libsystemd-shared")
VMSPAWN_FILES = ("usr/bin/systemd-vmspawn", "usr/lib/x86_64-linux-gnu/systemd/libsystemd-shared-*.so")
DISK_SIZE = "8G"
SPARE_SIZE = 64 << 20
NIC_MAC = "52:54:00:00:00:01"
PASSED_MAC = "52:54:00:00:00:02"
# What the initramfs must load to find the root: MODULES=most would be ten times larger, and is unpacked by
# an emulated CPU.
INITRAMFS_CONF = "MODULES=list\\nCOMPRESS=zstd\\nRESUME=none\\n"
INITRAMFS_MODULES = "virtio_pci\nvirtio_blk\next4\n"
NETWORK = f"[Match]\nMACAddress={NIC_MAC}\n\n[Network]\nDHCP=ipv4\n"
# nested=0: QEMU's emulated SVM has no SVM inside (kvm_amd would offer it).
MODPROBE = "options kvm_amd nested=0\n"
MODULES = "vhost_vsock\nvhost_net\n"
JOURNAL = "[Journal]\nStorage=persistent\nSyncIntervalSec=5s\nRateLimitBurst=0\n"
AUTOLOGIN = (
    "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --keep-baud 115200,57600 %I $TERM\n"
)
TIMEOUTS = "[Manager]\nDefaultTimeoutStartSec=300s\n"
# Each is seconds of an emulated CPU.
UNNEEDED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "man-db.timer", "dpkg-db-backup.timer", "fstrim.timer"),
    *("e2scrub_all.timer", "e2scrub_reap.service", "systemd-networkd-wait-online.service"),
)
KEY = CACHE / "hosts" / "lab-key"
BENCH_RECIPE = "tests/bench/probes/bench.toml"


@dataclass(frozen=True)
class LabParts:
    """What a lab machine boots: files on this machine. `root` has the QEMU to run it with."""

    root: Path
    disk: Path
    kernel: Path
    initrd: Path
    key: Path


def make_lab(*, core: bool = False, bench: bool = False) -> LabParts:
    """All layers. Downloads about 350 MB and takes about 4 minutes the first time. `core`: a lab with the
    default image alone; `bench`: one with what the bench compares with, and one image, bench."""
    base = make_lab_base(
        LAB_PACKAGES + (BENCH_PACKAGES if bench else []), "benchbase" if bench else "labbase"
    )
    prefix = "bench" if bench else "lab"
    installed = layers.make_installed(base, f"{prefix}installed", "update-initramfs -u")
    if bench:
        images = [layers.make_images(base, installed, "bench", BENCH_RECIPE)]
    else:
        names = ["default"] if core else ["default", "hardware"]
        images = [layers.make_images(base, installed, name) for name in names]
    key = make_key()
    disk = make_disk(base, installed, images, f"{prefix}{'core' if core else ''}disk")
    return LabParts(base / "root", disk / "host.ext4", disk / "vmlinuz", disk / "initrd", key)


def make_lab_base(packages: list[str], name: str) -> Path:
    wanted = list(dict.fromkeys([*HOST_PACKAGES, *packages]))
    target = CACHE / "hosts" / f"{name}-{digest(layers.HOST_SUITE, INITRAMFS_CONF, *wanted)}"
    with making(target) as partial:
        if partial is not None:
            say(f"building the lab host's root: Debian {layers.HOST_SUITE}, {len(wanted)} packages")
            root = partial / "root"
            folder = '"$1/etc/initramfs-tools/conf.d"'
            hook = f"mkdir -p {folder} && printf '{INITRAMFS_CONF}' > {folder}/lab"
            run_logged(
                [
                    *("mmdebstrap", "--variant=minbase", f"--include={','.join(wanted)}"),
                    *(f"--essential-hook={hook}", layers.HOST_SUITE, str(root)),
                ],
                CACHE / "logs" / f"{name}.log",
            )
            layers.finish_root(root)
            (root / "etc/initramfs-tools/modules").write_text(INITRAMFS_MODULES)
            layers.fetch_wheels(partial / "wheels", root)
    layers.drop_older(target)
    return target


def make_vmspawn() -> Path:
    """A folder whose `root` has systemd-vmspawn, to be put over the lab's root."""
    target = CACHE / "hosts" / f"vmspawn-{digest(layers.DEVICE_SUITE, *VMSPAWN_PACKAGES, *VMSPAWN_FILES)}"
    with making(target) as partial:
        if partial is not None:
            say(f"fetching systemd-vmspawn: Debian {layers.DEVICE_SUITE}")
            extracted = partial / "extracted"
            # A testing suite's Release file runs out while nobody refreshes a mirror's snapshot.
            options = ["--variant=extract", '--aptopt=Acquire::Check-Valid-Until "false"', "--mode=root"]
            include = f"--include={','.join(VMSPAWN_PACKAGES)}"
            run_logged(
                ["mmdebstrap", *options, include, layers.DEVICE_SUITE, str(extracted)],
                CACHE / "logs" / "vmspawn.log",
            )
            for pattern in VMSPAWN_FILES:
                for source in extracted.glob(pattern):
                    copy = partial / "root" / source.relative_to(extracted)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(source, copy)
            shutil.rmtree(extracted)
    layers.drop_older(target)
    return target


def make_key() -> Path:
    """The key with which tests log in to the lab; it opens nothing else."""
    if not KEY.exists():
        KEY.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "vmsilo-lab", "-f", str(KEY)], check=True
        )
    return KEY


def make_disk(base: Path, installed: Path, images: list[Path], name: str) -> Path:
    """A folder with the host's disk (ext4), its kernel and its initrd."""
    public = KEY.with_suffix(".pub").read_text()
    parts = [base.name, installed.name, *(image.name for image in images), public]
    settings = [NETWORK, MODPROBE, MODULES, JOURNAL, AUTOLOGIN, TIMEOUTS, DISK_SIZE]
    target = CACHE / "hosts" / f"{name}-{digest(*parts, *settings)}"
    with making(target) as partial:
        if partial is not None:
            say("making the lab host's disk")
            scratch = target.with_name(f".{name}-scratch")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                with mounted(
                    [installed / "upper", base / "root"], scratch / "upper", scratch / "work"
                ) as merged:
                    settle(merged, public)
                    for image in images:
                        shutil.copytree(
                            image, merged / "var/lib/vmsilo/images", dirs_exist_ok=True, symlinks=True
                        )
                    for wanted in ("vmlinuz", "initrd"):
                        newest = sorted((merged / "boot").glob(f"{wanted}*"))[-1]
                        shutil.copyfile(newest, partial / wanted)
                    run_logged(
                        [
                            *("mke2fs", "-q", "-t", "ext4", "-L", "lab", "-d", str(merged)),
                            *(str(partial / "host.ext4"), DISK_SIZE),
                        ],
                        CACHE / "logs" / f"{name}.log",
                    )
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    layers.drop_older(target)
    return target


def settle(root: Path, public: str) -> None:
    """What makes the root a host of its own: network, keys, a console, the modules that vmsilo documents."""
    files = {
        "etc/hostname": "lab\n",
        "etc/fstab": "/dev/vda / ext4 rw,noatime 0 1\n",
        "etc/systemd/network/10-lab.network": NETWORK,
        "etc/modprobe.d/lab.conf": MODPROBE,
        "etc/modules-load.d/lab.conf": MODULES,
        "etc/systemd/journald.conf.d/lab.conf": JOURNAL,
        "etc/systemd/system.conf.d/lab.conf": TIMEOUTS,
        "etc/systemd/system/serial-getty@ttyS0.service.d/lab.conf": AUTOLOGIN,
        "root/.ssh/authorized_keys": public,
        # Debian's own mirror addresses do not matter here: the lab has no way out.
        "etc/apt/sources.list": "",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "root/.ssh").chmod(0o700)
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True, exist_ok=True)
    for unit in ("systemd-networkd.service", "ssh.service"):
        link = wants / unit
        if not link.is_symlink():
            link.symlink_to(f"/usr/lib/systemd/system/{unit}")
    for unit in UNNEEDED:
        link = root / "etc/systemd/system" / unit
        if not os.path.lexists(link):
            link.symlink_to("/dev/null")
