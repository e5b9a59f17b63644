"""Which disk of a running VM is told to grow: crosvm counts them, and would cut another one short."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from main_loop import run
from vmsilod.config.model import VmConfig
from vmsilod.disks import Disks
from vmsilod.registry import Registry
from vmsilod.resources.disk_keys import key_of_status
from vmsilod.resources.record import Record
from vmsilod.systemd import INACTIVE
from vmsilod.vmm import drivers
from vmsilod.vmm.choose import VmmKind

if TYPE_CHECKING:
    from pathlib import Path

    from vmsilod.vmm.monitor import DiskPlace

MIB = 1 << 20


@pytest.mark.parametrize(("root_pmem", "index"), [(False, 2), (True, 1)])
def test_disk_is_counted_as_the_vmm_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, root_pmem: bool, index: int
) -> None:
    """After the root, where that is a disk, and the overlay."""
    path = tmp_path / "data.img"
    path.write_bytes(bytes(4096))
    told: list[tuple[int, int]] = []

    def resize_disk(place: DiskPlace, size: int) -> None:
        told.append((place.index, size))
        path.open("ab").truncate(size)

    monitor = SimpleNamespace(resize_disk=resize_disk)
    stand_in = SimpleNamespace(open_monitor=lambda _path, timeout: monitor)
    monkeypatch.setitem(cast("dict[VmmKind, Any]", drivers.DRIVERS), VmmKind.CROSVM, stand_in)
    config = VmConfig.model_validate(
        {
            **{"name": "box", "user": "root", "memory": 512, "cpus": 1, "color": "red", "image": "default"},
            **{
                "start_timeout": 9,
                "stop_timeout": 9,
                "additional_disks": [{"path": str(path), "id": "data"}],
            },
        }
    )
    registry = Registry()
    vm = registry.adopt("box")
    vm.unit = dataclasses.replace(INACTIVE, active="active")
    vm.config = config
    held = {"file:1:1": False, "file:1:2": True, key_of_status(path.stat()): True, "file:1:3": True}
    vm.record = Record(
        "box",
        vm.service,
        "a",
        vmm="crosvm",
        launched=True,
        config=config.to_json(),
        disks=held,
        root_pmem=root_pmem,
    )
    run(Disks(registry, lambda: cast("Any", None)).grow("box", "data", MIB))
    assert told == [(index, MIB)]
