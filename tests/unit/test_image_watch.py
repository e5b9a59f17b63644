"""A switch is seen by itself, and VMs that run something else need a restart."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from image_tree import FIRST, SECOND, make_version
from vmsilo_image import store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("gi", reason="needs python3-gi")

from gi.repository import GLib
from vmsilod.config.model import VmConfig
from vmsilod.image_watch import ImageWatch
from vmsilod.registry import Registry
from vmsilod.resources.record import Record
from vmsilod.systemd import INACTIVE, UnitState

CONFIG = {
    **{"name": "bank", "user": "user", "image": "web", "color": "red"},
    **{"memory": 1024, "cpus": 1, "start_timeout": 9, "stop_timeout": 9},
}
WAIT_MILLISECONDS = 10_000


class Watched:
    """The watch on a real loop; `wait` until it has told once more."""

    def __init__(self, images: Path) -> None:
        self.versions: dict[str, str] = {}
        self.told = 0
        self._main = GLib.MainLoop()
        self.watch = ImageWatch(images, self.versions, self._tell)

    def _tell(self) -> None:
        self.told += 1
        self._main.quit()

    def wait(self, milliseconds: int = WAIT_MILLISECONDS) -> None:
        timer = GLib.timeout_add(milliseconds, self._main.quit)
        before = self.told
        self._main.run()
        if self.told > before:
            GLib.source_remove(timer)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    make_version(tmp_path / "images", "web", FIRST)
    return tmp_path / "images"


@pytest.fixture
def watched(images: Path) -> Iterator[Watched]:
    found = Watched(images)
    yield found
    found.watch.close()


def test_what_is_current_is_known_at_once(watched: Watched) -> None:
    assert watched.versions == {"web": FIRST}
    assert watched.told == 0


def test_builds_roll_backs_and_removals_are_seen(watched: Watched, images: Path) -> None:
    make_version(images, "web", SECOND)
    watched.wait()
    assert watched.versions == {"web": SECOND}
    with store.hold_store(images):
        store.switch_current(images / "web", FIRST)
    watched.wait()
    assert watched.versions == {"web": FIRST}
    make_version(images, "mail", SECOND)
    watched.wait()
    assert watched.versions == {"web": FIRST, "mail": SECOND}
    make_version(images, "mail", FIRST)  # the new image is watched as well
    watched.wait()
    assert watched.versions == {"web": FIRST, "mail": FIRST}
    with store.hold_store(images):
        aside = store.set_aside(images, images / "web")
    watched.wait()
    assert watched.versions == {"mail": FIRST}
    store.remove_tree(aside)


def test_a_build_that_is_not_done_is_no_change(watched: Watched, images: Path) -> None:
    with store.private_build(images) as work:
        (work / "root").mkdir()
        watched.wait(500)
    assert watched.told == 0


def test_the_directory_may_come_later(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "images")
    assert watched.versions == {}
    make_version(tmp_path / "images", "web", FIRST)
    watched.wait()
    assert watched.versions == {"web": FIRST}
    shutil.rmtree(tmp_path / "images")
    watched.wait()
    assert watched.versions == {}
    watched.watch.close()


@pytest.mark.parametrize(
    ("used", "current", "reasons"),
    [
        (FIRST, FIRST, ()),
        (FIRST, SECOND, ("its image web has another current version",)),
        ("custom", SECOND, ()),
        ("", SECOND, ()),
        (FIRST, None, ()),
    ],
)
def test_who_needs_a_restart(used: str, current: str | None, reasons: tuple[str, ...]) -> None:
    """One that runs from the image needs none when there is no current version at all any more."""
    registry = Registry()
    vm = registry.adopt("bank")
    vm.config = VmConfig.model_validate(CONFIG)
    if current is not None:
        registry.images["web"] = current
    vm.record = Record("bank", vm.service, "a1", config=vm.config.to_json(), version=used)
    vm.unit = UnitState("active", "running")
    assert vm.restart_reasons == reasons
    assert vm.restart_needed == bool(reasons)
    changed = json.loads(vm.record.config) | {"memory": 4242}
    vm.record = Record("bank", vm.service, "a1", config=json.dumps(changed), version=used)
    assert vm.restart_reasons == ("its configuration has changed", *reasons)
    vm.unit = INACTIVE
    assert vm.restart_reasons == ()
