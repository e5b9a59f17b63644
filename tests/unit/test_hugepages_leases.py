"""Leases of images in huge pages: who waits, who shares, who keeps. The folder stands for a hugetlbfs, and a
recorded sysfs folder has a pool with free pages.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

pytest.importorskip("gi", reason="needs python3-gi")

from gi.repository import GLib
from vmsilod import loop
from vmsilod.config.image_options import ImageOptions
from vmsilod.config.model import VmConfig
from vmsilod.hugepages import images as images_module
from vmsilod.hugepages.errors import NoHugepages
from vmsilod.hugepages.images import HugepageImages
from vmsilod.hugepages.store import Store, StorePlace
from vmsilod.preparation import Request
from vmsilod.registry import Registry, Vm
from vmsilod.resources import image, record
from vmsilod.resources.image import BootChoice
from vmsilod.resources.record import Record

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from concurrent.futures import Future
    from pathlib import Path

T = TypeVar("T")
COUNTERS = {"nr": 8, "free": 8, "resv": 0, "surplus": 0}


def run(*coros: Coroutine[Any, Any, T]) -> list[T]:
    """All at the same time."""
    main_loop = GLib.MainLoop()
    futures = [loop.spawn(coro) for coro in coros]
    left = len(futures)

    def ended(_future: Future[T]) -> None:
        nonlocal left
        left -= 1
        if not left:
            loop.call_soon(main_loop.quit)

    for future in futures:
        future.add_done_callback(ended)
    main_loop.run()
    return [future.result() for future in futures]


class Bench:
    """VMs that start and end, as the runs make them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.texts: list[str] = []
        for path in ("huge", "sysfs", "state", "images/default/v1"):
            (folder / path).mkdir(parents=True)
        for name, count in COUNTERS.items():
            (folder / "sysfs" / f"{name}_hugepages").write_text(f"{count}\n")
        (folder / "images/default/v1/manifest.json").write_text("{}")
        (folder / "images/default/v1/root.erofs").write_bytes(b"root" * 1_000_000)
        (folder / "images/default/current").symlink_to("v1")
        monkeypatch.setattr(image, "IMAGES_DIR", folder / "images")
        for function in (image.find_boot_files, images_module.find_source):
            monkeypatch.setattr(function, "__defaults__", (folder / "images",))
        monkeypatch.setattr(record.save_record, "__defaults__", (folder / "state",))
        self.registry = Registry()
        self.mounts = True
        self.images = self.restart()

    def restart(self) -> HugepageImages:
        """As a new vmsilod."""
        places = StorePlace(
            *(self.folder / "huge", self.folder / "ledger", self.folder / "sysfs", self.folder / "mountinfo")
        )
        self.images = HugepageImages(self.registry, self._mount, self._changed, Store(places))
        if not (self.folder / "mountinfo").exists():
            (self.folder / "mountinfo").write_text("")
        run(self.images.repair())
        return self.images

    async def _mount(self, _unit: str) -> str:
        if self.mounts:
            (self.folder / "mountinfo").write_text(f"1 0 0:1 / {self.folder}/huge rw - hugetlbfs x rw\n")
        return "done" if self.mounts else "failed"

    def _changed(self, vm: Vm) -> None:
        self.texts.append(vm.status)

    def lease(self, name: str, **options: Any) -> Coroutine[Any, Any, Request]:
        config = VmConfig(
            name=name, user="user", memory=64, cpus=1, color="red", image="default", start_timeout=1,
            stop_timeout=1, image_options=ImageOptions(hugepages=True, **{"keep": 0, **options}),
        )  # fmt: skip
        vm = self.registry.adopt(name)
        vm.record = Record(name, "unit", "1", config=config.to_json())
        boot = BootChoice("default")
        request = Request(name, 1, 1, 1, False, boot, True, socket.SOCK_STREAM)  # noqa: FBT003
        return self.images.lease(vm, config, request)

    def end(self, name: str) -> Coroutine[Any, Any, None]:
        vm = self.registry.require(name)
        held = vm.record
        assert held is not None
        vm.forget_run()
        return self.images.release(held)

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "huge").iterdir())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def close(*requests: Request) -> None:
    for request in requests:
        assert request.huge_root is not None
        os.close(request.huge_root)


def test_vms_that_start_together_get_one_copy_and_the_last_drops_it(bench: Bench) -> None:
    first, second = run(bench.lease("a"), bench.lease("b"))
    close(first, second)
    assert bench.files == ["default=v1"]
    assert "waiting for its image in huge pages" in bench.texts
    assert bench.texts[-1] == ""
    assert [vm.record.hugepages for vm in bench.registry if vm.record] == ["default/v1"] * 2
    run(bench.end("a"))
    assert bench.files == ["default=v1"]
    run(bench.end("b"))
    assert bench.files == []


def test_old_version_is_kept_by_who_runs_it_alone(bench: Bench) -> None:
    close(*run(bench.lease("a", keep=600)))
    (bench.folder / "images/default/v1").rename(bench.folder / "images/default/v2")
    (bench.folder / "images/default/current").unlink()
    (bench.folder / "images/default/current").symlink_to("v2")
    close(*run(bench.lease("b", keep=600)))
    assert bench.files == ["default=v1", "default=v2"]
    run(bench.end("a"))  # nobody will want it any more, so it is not kept for that
    assert bench.files == ["default=v2"]
    run(bench.end("b"))
    assert bench.files == ["default=v2"]
    bench.restart()
    assert bench.files == []


def test_restart_keeps_what_a_record_names(bench: Bench) -> None:
    close(*run(bench.lease("a")))
    bench.restart()
    assert bench.files == ["default=v1"]
    run(bench.end("a"))
    assert bench.files == []


def test_nothing_is_dropped_before_all_users_are_known(bench: Bench) -> None:
    close(*run(bench.lease("a"), bench.lease("b")))
    later = bench.registry.require("b")
    held, later.record = later.record, None  # not read yet
    bench.images._repaired = False
    run(bench.end("a"))
    assert bench.files == ["default=v1"]
    later.record = held
    run(bench.images.repair())
    assert bench.files == ["default=v1"]


def test_without_pages_it_is_refused_or_done_without(bench: Bench) -> None:
    bench.mounts = False
    with pytest.raises(NoHugepages, match="cannot be mounted"):
        run(bench.lease("a"))
    (request,) = run(bench.lease("b", short_of_pages="page-cache"))
    assert request.huge_root is None
    held = bench.registry.require("b").record
    assert held is not None
    assert held.hugepages == ""


def test_root_of_ones_own_is_left_alone(bench: Bench) -> None:
    config = VmConfig(
        name="a", user="user", memory=64, cpus=1, color="red", image="default", start_timeout=1,
        stop_timeout=1, image_options=ImageOptions(hugepages=True), root_disk_readonly=False,
    )  # fmt: skip
    request = Request("a", 1, 1, 1, False, BootChoice("default"), False, socket.SOCK_STREAM)  # noqa: FBT003
    assert run(bench.images.lease(bench.registry.adopt("a"), config, request)) == [request]
    assert bench.files == []
