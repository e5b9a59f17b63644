"""What is done about isolated devices at boot and in an initramfs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from pci_tree import NIC, PciTree, Spec, lone_nic
from vmsilod.config.load import Checks, load_configuration
from vmsilod.pci import initramfs
from vmsilod.pci.early import isolate, read_isolated

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the files of the configuration must be root's")


def configure(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o644)
    return root / "usr", root / "etc"


@pytest.mark.parametrize(
    "files",
    [
        {"etc/vmsilo.toml": 'user = "root"\nisolated_pci_devices = ["01:00.0", "0000:02:00.1"]\n'},
        {
            "usr/vmsilo.toml": 'user = "root"\nisolated_pci_devices = ["03:00.0"]\n',
            "etc/vmsilo.toml": 'user = "root"\n',
        },
        {
            "usr/vmsilo.toml": 'user = "root"\nisolated_pci_devices = ["03:00.0"]\n',
            "usr/vmsilo.toml.d/10.toml": 'isolated_pci_devices = ["04:00.0"]\n',
            "etc/vmsilo.toml.d/10.toml": 'isolated_pci_devices = ["05:00.0"]\n',
            "etc/vmsilo.toml.d/20.toml": 'image = "x"\n',
        },
        {"etc/vmsilo.toml.d/10.toml": 'user = "root"\nisolated_pci_devices = []\n'},
    ],
)
def test_it_reads_the_list_that_vmsilod_reads(tmp_path: Path, files: dict[str, str]) -> None:
    roots = configure(tmp_path, files)
    settings = load_configuration(roots, Checks(files=False, accounts=False)).settings
    assert settings is not None
    assert read_isolated(roots) == (list(settings.isolated_pci_devices), [])


def test_a_broken_file_or_entry_takes_nothing_else_away(tmp_path: Path) -> None:
    roots = configure(
        tmp_path,
        {
            "etc/vmsilo.toml": 'user = "root"\nisolated_pci_devices = ["01:00.0", "nonsense", 7]\n',
            "etc/vmsilo.toml.d/10.toml": "isolated_pci_devices = [",
            "etc/vmsilo.toml.d/20.toml": 'isolated_pci_devices = ["02:00.0"]',
        },
    )
    (tmp_path / "etc/vmsilo.toml.d/20.toml").chmod(0o666)
    addresses, problems = read_isolated(roots)
    assert addresses == [NIC]
    assert len(problems) == 4
    assert "can be written by others than root" in problems[1]


def test_at_boot_a_device_is_claimed_before_any_driver_has_it(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path, driver="")
    assert isolate((NIC,), tree.roots) == []
    assert tree.snapshot()[NIC] == ("vfio-pci", "vfio-pci")


@pytest.mark.parametrize(
    ("line", "driver"),
    [
        ("quiet vmsilo.pci=off ro", ""),
        ("vmsilo.pci=on vmsilo.pci=off", ""),
        ("vmsilo.pci=off vmsilo.pci=on", "vfio-pci"),
        ("quiet xvmsilo.pci=off vmsilo.pci", "vfio-pci"),
    ],
)
def test_the_kernels_command_line_switches_it_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, driver: str
) -> None:
    tree = lone_nic(tmp_path, driver="")
    tree.put("proc/cmdline", f"BOOT_IMAGE=/vmlinuz {line}\n")
    assert isolate((NIC,), tree.roots) == []
    assert tree.snapshot()[NIC] == (driver, driver)
    assert ("vmsilo.pci=off" in capsys.readouterr().err) == (not driver)


@pytest.mark.parametrize("group", [None, 2])
def test_without_iommu_or_vfio_it_is_kept_from_the_hosts_driver(tmp_path: Path, group: int | None) -> None:
    tree = PciTree(tmp_path, Spec(NIC, wants="e1000e", group=group), vfio=False)
    assert isolate((NIC,), tree.roots) == []
    tree.load("e1000e")
    tree.write(tmp_path / "sys/bus/pci/drivers_probe", NIC)
    assert tree.snapshot()[NIC] == ("", "vfio-pci")


def test_a_driver_that_was_first_gives_way_unless_the_host_needs_it(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    tree.add_link("enp1s0", NIC)
    assert "only network link that is up" in isolate((NIC,), tree.roots)[0]
    assert tree.driver(NIC) == "e1000e"
    tree.add_link("enp0s31", "0000:00:1f.3")
    assert isolate((NIC, "0000:0f:00.0"), tree.roots) == [
        "0000:0f:00.0 is not isolated: there is no PCI device 0000:0f:00.0"
    ]
    assert tree.driver(NIC) == "vfio-pci"


def test_an_initramfs_has_a_rule_and_an_order_of_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = lone_nic(tmp_path / "host", extra={"modalias": "pci:v00008086d000010D3\n"})
    program = tmp_path / "bin/modprobe"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$3" = pci:v00008086d000010D3 ] && echo e1000e\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    initramfs.write_initramfs((NIC,), tmp_path / "tree", "6.12", tree.roots, tmp_path / "stamps")
    rules = (tmp_path / "tree/etc/udev/rules.d/40-vmsilo-pci.rules").read_text().splitlines()
    assert rules[1:] == [
        'ACTION=="add", SUBSYSTEM=="pci", IMPORT{cmdline}="vmsilo.pci"',
        f'ACTION=="add", SUBSYSTEM=="pci", ENV{{vmsilo.pci}}!="off", TEST=="[pci/{NIC}]driver_override", '
        f'ATTR{{[pci/{NIC}]vendor}}=="0x8086", ATTR{{[pci/{NIC}]device}}=="0x10d3", '
        f'ATTR{{[pci/{NIC}]driver_override}}="vfio-pci"',
    ]
    order = (tmp_path / "tree/etc/modprobe.d/vmsilo-pci.conf").read_text().splitlines()
    assert order[1:] == ["softdep e1000e pre: vfio-pci"]
    initramfs.write_initramfs((), tmp_path / "none", "6.12", tree.roots, tmp_path / "stamps")
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "stamps/6.12").exists()


def test_a_device_that_is_not_there_has_neither_rule_nor_stamp(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path / "host")
    absent = "0000:0f:00.0"
    initramfs.write_initramfs((absent, NIC), tmp_path / "tree", "6.12", tree.roots, tmp_path / "stamps")
    assert absent not in (tmp_path / "tree/etc/udev/rules.d/40-vmsilo-pci.rules").read_text()
    assert (tmp_path / "stamps/6.12").read_text() == f"{NIC}\n"


def test_a_stale_initramfs_is_noticed(tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    kernel = os.uname().release
    assert initramfs.find_stale((NIC,), tmp_path, (hook,)) is None, "nobody builds one here"
    hook.touch()
    fact, hint = initramfs.find_stale((NIC,), tmp_path, (hook,)) or ("", "")
    assert fact.endswith(f"{kernel} was built to isolate none, and the configuration says {NIC}")
    assert "update-initramfs -u" in hint
    initramfs.write_stamp((NIC,), kernel, tmp_path)
    assert initramfs.find_stale((NIC,), tmp_path, (hook,)) is None
    assert NIC in (initramfs.find_stale((), tmp_path, (hook,)) or ("",))[0]
