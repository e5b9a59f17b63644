"""memory_max and vhost_user in a VM's file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from vmsilod.config.load import Checks, Configuration, load_configuration
from vmsilod.config.model import VmConfig

if TYPE_CHECKING:
    from pathlib import Path


def load(tmp_path: Path, text: str) -> Configuration:
    (tmp_path / "vms.d").mkdir()
    (tmp_path / "vmsilo.toml").write_text('user = "david"')
    (tmp_path / "vms.d/a.toml").write_text(text)
    return load_configuration([tmp_path], Checks(files=False, accounts=False, ownership=False))


def test_other_keys_are_options_of_the_device_and_survive_the_record(tmp_path: Path) -> None:
    text = """
    memory = 1024
    memory_max = 2048
    vhost_user = [
      { type = "fs", socket = "/run/s.sock", tag = "a, b", queue-size = 64, xattr = true, sizes = [1, 2] },
      { type = "net", socket = "/run/n.sock" },
    ]
    """
    configuration = load(tmp_path, text)
    assert not configuration.problems
    vm = configuration.vms["a"]
    first, second = vm.vhost_user
    assert (first.type, first.socket, second.options) == ("fs", "/run/s.sock", {})
    assert first.options == {"tag": "a, b", "queue-size": 64, "xattr": True, "sizes": (1, 2)}
    assert VmConfig.from_json(vm.to_json()) == vm
    assert vm.model_copy(update={"vhost_user": (first,)}).digest() != vm.digest()


@pytest.mark.parametrize(
    ("line", "key", "fact"),
    [
        (
            "root_disk_readonly = false",
            "root_disk_readonly",
            "the image's root belongs to all VMs of the image",
        ),
        ("memory_max = 1024", "memory_max", "1024 is not above memory (1024)"),
        ("memory_max = 1100", "memory_max", "1100 is not memory plus a multiple of 128"),
        ('vmm = "crosvm"\nmemory_max = 2048', "memory_max", "crosvm cannot plug memory in"),
        (
            'vmm = "cloud-hypervisor"\npci_devices = ["01:00.0"]',
            "pci_devices",
            "not with cloud-hypervisor",
        ),
        ('vmm = "cloud-hypervisor"\nusb = true', "usb", "not with cloud-hypervisor"),
        ('vhost_user = [{ socket = "/s" }]', "vhost_user.0.type", "required, but not set"),
        ('vhost_user = [{ type = "fs" }]', "vhost_user.0.socket", "required, but not set"),
        (
            'vhost_user = [{ type = "fs", socket = "s" }]',
            "vhost_user.0.socket",
            "'s' is not an absolute path",
        ),
        (
            'vhost_user = [{ type = "f,s", socket = "/s" }]',
            "vhost_user.0.type",
            "'f,s' is not a type of vhost-user device, such as fs or net",
        ),
        (
            'vhost_user = [{ type = "fs", socket = "/s", x = 1.5 }]',
            "vhost_user.0.options.x",
            "'1.5' is not a string, number, boolean or list of numbers",
        ),
        (
            'vhost_user = [{ type = "fs", socket = "/s", "a=b" = 1 }]',
            "vhost_user.0.options",
            "'a=b' is not the name of an option",
        ),
        (
            'vmm = "crosvm"\nvhost_user = [{ type = "floppy", socket = "/s" }]',
            "vhost_user",
            "crosvm has no vhost-user device of type 'floppy'",
        ),
        (
            'vmm = "cloud-hypervisor"\nvhost_user = [{ type = "fs", socket = "/s", path = "/x" }]',
            "vhost_user",
            "'path' of a vhost-user device is set by vmsilo itself",
        ),
    ],
)
def test_what_cannot_be_is_told(tmp_path: Path, line: str, key: str, fact: str) -> None:
    configuration = load(tmp_path, line)
    assert [(problem.key, problem.fact) for problem in configuration.problems] == [(key, fact)]
    assert "a" not in configuration.vms


def test_unknown_type_names_those_that_are_known(tmp_path: Path) -> None:
    (problem,) = load(tmp_path, 'vmm = "qemu"\nvhost_user = [{ type = "x", socket = "/s" }]').problems
    assert "block" in problem.hint
    assert "fs" in problem.hint
