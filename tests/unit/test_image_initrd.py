"""The bytes the kernel unpacks, and the order in which init loads modules."""

from __future__ import annotations

import lzma
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from vmsilo_image import cpio
from vmsilo_image.errors import ImageError
from vmsilo_image.initrd import APPLETS, CRYPT_PROGRAMS, build_initrd, has_crypt, has_pmem
from vmsilo_image.modules import module_name, plan_load_order
from vmsilo_image.rootfs import enable_own_network
from vmsilo_image.tree import find_ids, resolve_inside, write_file
from vmsilo_image.trim import plan_static_nodes

GUEST_IMAGE = Path(__file__).parents[2] / "guest" / "image"

# From Debian's cloud kernel, names of paths shortened.
MODULES_DEP = """\
kernel/fs/erofs/erofs.ko.xz: kernel/lib/libcrc32c.ko.xz
kernel/lib/libcrc32c.ko.xz:
kernel/fs/overlayfs/overlay.ko.xz:
kernel/drivers/virtio/virtio_mmio.ko.xz:
kernel/drivers/block/virtio_blk.ko.xz:
kernel/drivers/char/hw_random/virtio-rng.ko.xz: kernel/drivers/char/hw_random/rng-core.ko.xz
kernel/drivers/char/hw_random/rng-core.ko.xz:
kernel/net/vmw_vsock/vsock.ko.xz:
kernel/net/vmw_vsock/virtio_transport.ko.xz: kernel/net/vmw_vsock/virtio_transport_common.ko.xz \
kernel/net/vmw_vsock/vsock.ko.xz
kernel/net/vmw_vsock/virtio_transport_common.ko.xz: kernel/net/vmw_vsock/vsock.ko.xz
"""
BUILTIN = "kernel/fs/ext4/ext4.ko\nkernel/drivers/virtio/virtio_pci.ko\n"


def read_newc(data: bytes) -> dict[str, tuple[int, bytes]]:
    """An independent reader: name -> (mode, data), across concatenated archives as the kernel reads them."""
    members = {}
    at = 0
    while at < len(data):
        if data[at] == 0:
            at += 1
            continue
        assert at % 4 == 0
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        body = at + 110 + name_size
        body += -body % 4
        if name != "TRAILER!!!":
            members[name] = (mode, data[body : body + size])
        at = body + size + -(body + size) % 4
    return members


def test_archive_reads_back() -> None:
    entries = [
        cpio.directory("d"),
        cpio.regular("d/odd", b"12345", 0o400),
        cpio.symlink("d/link", "odd"),
        cpio.character_device("d/console", 0o600, (5, 1)),
    ]
    archive = cpio.newc_archive(entries)
    members = read_newc(archive)
    assert len(archive) % 4 == 0
    assert list(members) == ["d", "d/odd", "d/link", "d/console"]
    assert members["d/odd"] == (stat.S_IFREG | 0o400, b"12345")
    assert members["d/link"] == (stat.S_IFLNK | 0o777, b"odd")
    assert stat.S_ISCHR(members["d/console"][0])


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs cpio")
def test_cpio_agrees() -> None:
    archive = cpio.newc_archive([cpio.directory("a"), cpio.regular("a/b", b"x" * 7)])
    result = subprocess.run(["cpio", "-t"], input=archive, capture_output=True, check=True)
    assert result.stdout.split() == [b"a", b"a/b"]


def test_secret_follows_any_padded_archive() -> None:
    secret = "0f" * 32
    first = cpio.pad(cpio.newc_archive([cpio.regular("init", b"#!")]), 512)
    members = read_newc(first + cpio.secret_archive(secret))
    assert members["vmsilo/secret"] == (stat.S_IFREG | 0o400, secret.encode() + b"\n")
    assert members["vmsilo"][0] == stat.S_IFDIR | 0o711
    assert list(members) == ["init", "vmsilo", "vmsilo/secret"]


def test_ssh_keys_travel_with_the_secret() -> None:
    keys = cpio.SshKeys(
        host=b"private\n", authorized={"anna": b"ssh-ed25519 A\n", "root": b"ssh-ed25519 B\n"}
    )
    members = read_newc(cpio.secret_archive("0f" * 32, keys))
    assert members["vmsilo/ssh/host_key"] == (stat.S_IFREG | 0o400, b"private\n")
    assert members["vmsilo/ssh/authorized/anna"] == (stat.S_IFREG | 0o444, b"ssh-ed25519 A\n")
    assert members["vmsilo/ssh/authorized/root"][1] == b"ssh-ed25519 B\n"
    assert members["vmsilo/ssh"][0] == members["vmsilo/ssh/authorized"][0] == stat.S_IFDIR | 0o711


def test_network_files_travel_with_the_secret() -> None:
    files = {"network/10-vmsilo-wan.link": "[Link]\n", "resolved.conf.d/10-vmsilo.conf": "[Resolve]\n"}
    members = read_newc(cpio.secret_archive("0f" * 32, None, files))
    assert members["vmsilo/systemd/network/10-vmsilo-wan.link"] == (stat.S_IFREG | 0o644, b"[Link]\n")
    assert members["vmsilo/systemd/resolved.conf.d/10-vmsilo.conf"][1] == b"[Resolve]\n"
    folders = [name for name, (mode, _) in members.items() if mode == stat.S_IFDIR | 0o755]
    assert folders == ["vmsilo/systemd", "vmsilo/systemd/network", "vmsilo/systemd/resolved.conf.d"]


@pytest.mark.parametrize(
    "name",
    ["", "x", "network/", "network/../x", "network/a/b", "system/a.service", "system/x/a.mount", "other/a"],
)
def test_only_network_configuration_travels_as_such(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a file"):
        cpio.secret_archive("0f" * 32, None, {name: "x"})


@pytest.mark.parametrize("login", ["", "../root", "a/b", "A", "-x"])
def test_a_login_is_a_plain_name(login: str) -> None:
    with pytest.raises(ValueError, match="login"):
        cpio.secret_archive("0f" * 32, cpio.SshKeys(host=b"x", authorized={login: b"y"}))


@pytest.mark.parametrize("secret", ["", "0" * 63, "0" * 65, "G" * 64, "0" * 63 + "\n"])
def test_secret_is_checked(secret: str) -> None:
    with pytest.raises(ValueError, match="64"):
        cpio.secret_archive(secret)


def test_dependencies_come_first_and_once() -> None:
    order = plan_load_order(
        ["erofs", "vsock", "virtio_transport", "virtio_rng", "virtio_blk"], MODULES_DEP, BUILTIN
    )
    assert [module_name(path) for path in order] == [
        "libcrc32c",
        "erofs",
        "vsock",
        "virtio_transport_common",
        "virtio_transport",
        "rng_core",
        "virtio_rng",
        "virtio_blk",
    ]


def test_what_a_module_wants_without_saying_so_comes_before_everything() -> None:
    dependencies = MODULES_DEP + "kernel/crypto/crc32c_generic.ko.xz:\n"
    order = plan_load_order(["erofs"], dependencies, BUILTIN, first_if_there=["crc32c_generic", "gone"])
    assert [module_name(path) for path in order] == ["crc32c_generic", "libcrc32c", "erofs"]


def test_builtin_modules_are_skipped() -> None:
    assert plan_load_order(["ext4", "virtio_pci"], MODULES_DEP, BUILTIN) == []


def test_all_unknown_modules_are_named() -> None:
    with pytest.raises(ImageError, match="no erofs2, vhost"):
        plan_load_order(["erofs2", "vhost", "overlay"], MODULES_DEP, BUILTIN)


def test_initrd_holds_init_its_applets_and_uncompressed_modules(tmp_path: Path) -> None:
    base = tmp_path / "usr/lib/modules/6.1-x/kernel"
    base.mkdir(parents=True)
    (tmp_path / "lib").symlink_to("usr/lib")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/busybox").write_bytes(b"BB")
    names = ("erofs", "overlay", "virtio_blk", "vsock", "vmw_vsock_virtio_transport")
    network = ("failover", "net_failover", "virtio_net")
    dependencies = "".join(f"kernel/{name}.ko.xz:\n" for name in (*names, *network[:2]))
    needs = "kernel/net_failover.ko.xz kernel/failover.ko.xz"
    (base.parent / "modules.dep").write_text(f"{dependencies}kernel/virtio_net.ko.xz: {needs}\n")
    builtin = ("button", "ext4", "virtio_console", "virtio_rng", "virtio_pci", "virtio_mmio")
    (base.parent / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in builtin))
    for name in (*names, *network):
        (base / f"{name}.ko.xz").write_bytes(lzma.compress(name.encode()))
    init = (GUEST_IMAGE / "init").read_bytes()
    archive = build_initrd(tmp_path, "6.1-x", init)
    members = read_newc(archive)
    assert len(archive) % 512 == 0
    assert members["init"] == (stat.S_IFREG | 0o755, init)
    assert members["modules/erofs.ko"][1] == b"erofs"
    listed = members["modules/list"][1].decode().split()
    for_interfaces = members["modules/network"][1].decode().split()
    assert [f"modules/{name}" for name in (*listed, *for_interfaces)] == [
        name for name in members if name.endswith(".ko")
    ]
    assert for_interfaces == [f"{name}.ko" for name in network]
    assert all(members[f"bin/{applet}"][1] == b"busybox" for applet in APPLETS)


@pytest.mark.parametrize(
    ("module_files", "builtin", "expected"),
    [
        (("virtio_pmem", "nd_pmem"), (), True),
        (("virtio_pmem",), ("nd_pmem",), True),
        (("virtio_pmem",), (), False),
    ],
)
def test_image_says_whether_its_root_can_be_persistent_memory(
    tmp_path: Path, module_files: tuple[str, ...], builtin: tuple[str, ...], *, expected: bool
) -> None:
    base = tmp_path / "lib/modules/6.1-x"
    base.mkdir(parents=True)
    (base / "modules.dep").write_text("".join(f"kernel/{name}.ko:\n" for name in module_files))
    (base / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in builtin))
    assert has_pmem(tmp_path, "6.1-x") is expected


@pytest.mark.parametrize(
    ("module_files", "programs", "expected"),
    [
        (("xts", "dm-crypt", "aes_generic"), CRYPT_PROGRAMS, True),
        (("xts", "dm-crypt", "aes"), CRYPT_PROGRAMS, True),
        (("xts", "dm-crypt"), CRYPT_PROGRAMS, False),
        (("xts", "aes"), CRYPT_PROGRAMS, False),
        (("xts", "dm-crypt", "aes"), CRYPT_PROGRAMS[:1], False),
    ],
)
def test_image_says_whether_its_overlay_can_be_encrypted(
    tmp_path: Path, module_files: tuple[str, ...], programs: tuple[str, ...], *, expected: bool
) -> None:
    base = tmp_path / "lib/modules/6.1-x"
    base.mkdir(parents=True)
    (base / "modules.dep").write_text("".join(f"kernel/{name}.ko:\n" for name in module_files))
    (base / "modules.builtin").write_text("")
    (tmp_path / "usr/sbin").mkdir(parents=True)
    for program in programs:
        (tmp_path / program.lstrip("/")).touch()
    assert has_crypt(tmp_path, "6.1-x") is expected


def test_init_is_a_valid_shell_script() -> None:
    subprocess.run(["sh", "-n", str(GUEST_IMAGE / "init")], check=True)


def test_paths_never_leave_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "escape").symlink_to("/../../etc")
    (root / "up").symlink_to("../../..")
    (root / "loop").symlink_to("loop")
    assert resolve_inside(root, "/escape/x") == root / "etc/x"
    assert resolve_inside(root, "/up/etc") == root / "etc"
    with pytest.raises(ImageError, match="too many"):
        resolve_inside(root, "/loop")
    (tmp_path / "victim").write_text("safe")
    (root / "etc/link").symlink_to(tmp_path / "victim")
    write_file(root, "/etc/link", b"new", 0o640, (tmp_path.stat().st_uid, tmp_path.stat().st_gid))
    assert (tmp_path / "victim").read_text() == "safe"
    assert (root / "etc/link").read_bytes() == b"new"
    assert stat.S_IMODE((root / "etc/link").stat().st_mode) == 0o640


def test_owners_are_the_guests(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nuser:x:1000:1001::/home/user:/bin/sh\n")
    (tmp_path / "etc/group").write_text("root:x:0:\nuser:x:1001:\naudio:x:29:user\n")
    assert find_ids(tmp_path, "user") == (1000, 1001)
    assert find_ids(tmp_path, "user:audio") == (1000, 29)
    with pytest.raises(ImageError, match="no user mallory"):
        find_ids(tmp_path, "mallory")


def test_static_nodes() -> None:
    devname = "# comment\nfuse fuse c10:229\ntun net/tun c10:200\nloop loop-control c10:237\n"
    assert plan_static_nodes(devname).splitlines() == [
        "c! /dev/fuse 0600 - - - 10:229",
        "d /dev/net 0755 - - -",
        "c! /dev/net/tun 0600 - - - 10:200",
        "c! /dev/loop-control 0600 - - - 10:237",
    ]


@pytest.mark.parametrize(
    ("name", "enabled"), [("20-lan.network", True), ("20-lan.link", False), ("nothing", False)]
)
def test_an_image_with_a_network_of_its_own_starts_it(tmp_path: Path, name: str, *, enabled: bool) -> None:
    folder = tmp_path / "etc/systemd/network"
    folder.mkdir(parents=True)
    (folder / name).write_text("[Match]\nName=enp1s0\n")
    enable_own_network(tmp_path)
    link = tmp_path / "etc/systemd/system/multi-user.target.wants/vmsilo-network.target"
    assert link.is_symlink() is enabled
