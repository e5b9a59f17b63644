"""What a VM's file may say about disks, and what its guest is told of them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from vmsilod.config.disks import DiskOptions, find_faults, parse_size, persist_name
from vmsilod.config.model import VmConfig, resolve_vm
from vmsilod.config.schema import GlobalConfig, VmFile
from vmsilod.disk_plans import PERSIST_LIST, plan_guest_files, plan_request
from vmsilod.resources.shares import escape_path


def load(**content: Any) -> VmConfig:
    return resolve_vm(GlobalConfig(user="user"), VmFile.model_validate({"name": "vm", **content}), [])


def test_the_example_of_crosvms_words() -> None:
    example = {
        "path": "/srv/data.qcow2",
        "ro": False,
        "sparse": True,
        "block-size": 4096,
        "id": "data",
        "direct": False,
    }
    (disk,) = load(additional_disks=[example]).additional_disks
    assert (disk.block_size, disk.id, disk.lock, disk.format) == (4096, "data", True, "raw")
    config = load(additional_disks=["/a", {"path": "/b", "id": "x"}, "/c"], root_overlay={"type": "qcow2"})
    assert [each.id for each in config.additional_disks] == ["disk0", "x", "disk2"]
    assert VmConfig.from_json(config.to_json()) == config
    assert plan_request(config).overlay_size == 10 << 30


@pytest.mark.parametrize(
    "content",
    [
        {"additional_disks": [{"path": "relative"}]},
        {"additional_disks": [{"path": "/a/../b"}]},
        {"additional_disks": [{"path": "/a\nb"}]},
        {"additional_disks": ["/a", "/a"]},
        {"additional_disks": [{"path": "/a", "id": "disk1"}, "/b"]},
        {"additional_disks": [{"path": "/a", "mount": "/x"}, {"path": "/b", "mount": "/x"}]},
        {"additional_disks": [{"path": "/a", "id": "vmsilo-overlay"}]},
        {"additional_disks": [{"path": "/a", "id": "persist"}]},
        {"additional_disks": [{"path": "/a", "id": "x,y"}]},
        {"additional_disks": [{"path": "/a", "id": "a" * 21}]},
        {"additional_disks": [{"path": "/a", "block_size": 513}]},
        {"additional_disks": [{"path": "/a", "format": "vmdk"}]},
        {"additional_disks": [{"path": "/a", "ro": True, "create": {"size": "1G"}}]},
        {"additional_disks": [{"path": "/a", "format": "qcow2", "create": {"size": "1G"}}]},
        {"additional_disks": [{"path": "/a", "mount": "/"}]},
        {"additional_disks": [{"path": "/a", "mount": "/proc/x"}]},
        {"additional_disks": [{"path": "/a", "mount": "/a b"}]},
        {"persist": ["etc/ssh"]},
        {"persist": ["/"]},
        {"persist": ["/proc"]},
        {"persist": ["/run/x"]},
        {"persist": ["/etc/../proc"]},
        {"persist": ["/etc//ssh"]},
        {"persist": ["/etc/"]},
        {"persist": ["/a\nb"]},
        {"persist": ["/a", "/a"]},
        {"persist": ["/" + "x" * 300]},
        {"persist_size": "1M"},
        {"root_overlay": {"size": "-1G"}},
        {"root_overlay": {"size": "9999999T"}},
        {"root_overlay": {"type": "ram"}},
    ],
)
def test_what_cannot_be_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        load(**content)


def test_sizes() -> None:
    assert [parse_size(text) for text in ("16M", "10G", "10GiB", "1T")] == [
        16 << 20,
        10 << 30,
        10 << 30,
        1 << 40,
    ]
    assert parse_size("20000001") % 4096 == 0


def test_kept_paths_have_names_of_their_own() -> None:
    paths = ["/etc/ssh", "/etc%2Fssh", "/etc-ssh", "/etc/ssh/sub", "/...", "/ü ö"]
    names = [persist_name(path) for path in paths]
    assert len(set(names)) == len(paths)
    assert not any("/" in name or " " in name for name in names)


@pytest.mark.parametrize(
    ("content", "boot", "vmm", "key"),
    [
        ({"persist": ["/etc/ssh"]}, (False, False), "qemu", "persist"),
        ({"persist": ["/etc/ssh"]}, (True, True), "qemu", "persist"),
        ({"persist": ["/etc/ssh"]}, (True, False), "qemu", None),
        ({"additional_disks": ["/tmp/data"]}, (True, False), "qemu", "additional_disks"),
        ({"additional_disks": ["/var/tmp/x/data"]}, (True, False), "qemu", "additional_disks"),
        ({"additional_disks": ["/tmpdata"]}, (True, False), "qemu", None),
        (
            {"additional_disks": [{"path": "/a", "block_size": 4096}]},
            (True, False),
            "cloud-hypervisor",
            "additional_disks",
        ),
        ({"additional_disks": [{"path": "/a", "block_size": 4096}]}, (True, False), "crosvm", None),
        (
            {"persist": ["/data"], "additional_disks": [{"path": "/a", "mount": "/data/x"}]},
            (True, False),
            "qemu",
            "additional_disks",
        ),
    ],
)
def test_what_does_not_fit_together(
    content: dict[str, Any], boot: tuple[bool, bool], vmm: str, key: str | None
) -> None:
    options = DiskOptions.model_validate(content)
    faults = find_faults(options, root_readonly=boot[0], own_boot=boot[1], vmm=vmm)
    assert [fault[0] for fault in faults] == ([key] if key else [])


@pytest.mark.parametrize(
    "content",
    [
        {"root_overlay": {"type": "tmpfs"}},
        {"root_disk_readonly": False},
        {"initramfs": "/boot/initrd"},
        {"kernel": "/boot/vmlinuz"},
    ],
)
def test_no_disk_is_made_for_an_overlay_that_is_not_used(content: dict[str, Any]) -> None:
    assert plan_request(load(**content)).overlay_size is None


def test_the_guest_is_told_of_what_it_mounts() -> None:
    disks = [
        {"path": "/a", "id": "data", "mount": "/srv/my-data"},
        {"path": "/b", "id": "b", "ro": True, "mount": "/b"},
        "/c",
    ]
    files = plan_guest_files(load(additional_disks=disks, persist=["/etc/ssh/sub", "/etc/ssh"]))
    unit = files["system/srv-my\\x2ddata.mount"]
    assert "What=/dev/disk/by-id/virtio-data\nWhere=/srv/my-data\nOptions=rw,nodev,nosuid,discard\n" in unit
    assert "Wants=systemd-growfs@srv-my\\x2ddata.service\n" in unit
    assert "Options=ro,nodev,nosuid\n" in files["system/b.mount"]
    assert "growfs" not in files["system/b.mount"]
    wants = files["system/local-fs.target.d/50-vmsilo-disks.conf"]
    assert wants == "[Unit]\nWants=srv-my\\x2ddata.mount b.mount\n"
    # Parents first: what is seeded or mounted later lies in them.
    assert files[PERSIST_LIST].splitlines() == ["etc%2Fssh /etc/ssh", "etc%2Fssh%2Fsub /etc/ssh/sub"]
    assert plan_guest_files(load()) == {}


@pytest.mark.parametrize(
    ("path", "escaped"),
    [("/data", "data"), ("/a-b/c", "a\\x2db-c"), ("/.hidden/x", "\\x2ehidden-x"), ("/ü", "\\xc3\\xbc")],
)
def test_units_are_called_as_systemd_calls_them(path: str, escaped: str) -> None:
    assert escape_path(path) == escaped
