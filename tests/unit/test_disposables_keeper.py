"""The keeper's clean-up: what cannot be taken away yet is neither forgotten nor left alone.

Lifecycle, publication and leashes are stand-ins: of interest here is a systemd that does not answer them.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest
from gi.repository import GLib
from vmsilod import loop
from vmsilod.bus.requests import DisposableRequest
from vmsilod.config.load import Configuration
from vmsilod.config.model import VmConfig
from vmsilod.config.schema import GlobalConfig
from vmsilod.disposables import keeper, records
from vmsilod.disposables.keeper import Disposables
from vmsilod.disposables.records import DisposableRecord
from vmsilod.errors import Busy, Failed
from vmsilod.registry import Registry
from vmsilod.systemd import INACTIVE

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from vmsilod.registry import Vm

UP = dataclasses.replace(INACTIVE, active="active")


class Silent:
    """A lifecycle and a publication; each call of a name fails as long as `failures` has errors for it."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.failures: dict[str, list[Exception]] = {}
        self.calls: list[str] = []
        self.ends = True  # whether a stop stops

    def _ask(self, call: str) -> None:
        self.calls.append(call)
        if self.failures.get(call):
            raise self.failures[call].pop(0)

    async def discard(self, name: str) -> None:
        self._ask("discard")
        if self.ends:
            self.registry.require(name).unit = INACTIVE

    async def remove(self, _vm: Vm) -> None:
        self._ask("remove")

    async def reload(self) -> None:
        self.calls.append("reload")

    def drop_gone(self) -> None:
        self.registry.drop_gone()


class Watched:
    def __init__(self) -> None:
        self.names: dict[str, Callable[[str], None]] = {}

    def watch(self, name: str, on_gone: Callable[[str], None]) -> None:
        self.names[name] = on_gone

    def drop(self, name: str) -> None:
        self.names.pop(name, None)

    def require_room(self) -> None:
        pass

    def end(self, name: str) -> None:
        self.names.pop(name)(name)


@dataclasses.dataclass
class Desk:
    disposables: Disposables
    silent: Silent
    watched: Watched
    registry: Registry
    directory: Path

    def load(self, *those: DisposableRecord) -> None:
        for record in those:
            records.save_record(record)
            vm = self.registry.adopt(record.name)
            vm.config, vm.unit = VmConfig.from_json(record.config), UP
        run(self.disposables.load())
        configuration = Configuration(GlobalConfig(user="root"), {}, (), {})
        self.disposables.amend(configuration)
        self.disposables.resume()

    @property
    def left(self) -> list[str]:
        return sorted(path.stem for path in self.directory.iterdir())


def run(coro: Coroutine[Any, Any, object]) -> None:
    main_loop = GLib.MainLoop()
    future = loop.spawn(coro)
    future.add_done_callback(lambda _: loop.call_soon(main_loop.quit))
    main_loop.run()
    future.result()


async def gone(desk: Desk, name: str) -> None:
    """Until nothing is left of it."""
    while (disposable := desk.disposables._all.get(name)) is not None:
        await loop.with_deadline(disposable.gone, 5)


def record_of(name: str, *holders: str, ended: bool = False) -> DisposableRecord:
    config = VmConfig.model_validate(
        {
            **{"name": name, "user": "root", "memory": 512, "cpus": 1, "color": "red", "image": "default"},
            **{"start_timeout": 9, "stop_timeout": 9, "template": "work"},
        }
    )
    return DisposableRecord(name, config.to_json(), 0, holders, ended)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    for name in ("load_records", "save_record", "forget_record"):
        monkeypatch.setattr(records, name, partial(getattr(records, name), directory=tmp_path))
    monkeypatch.setattr(keeper, "RETRY_SECONDS", 0.01)
    registry = Registry()
    silent, watched = Silent(registry), Watched()
    disposables = Disposables(registry, *cast("tuple[Any, ...]", (silent, silent, None, watched)))
    return Desk(disposables, silent, watched, registry, tmp_path)


@pytest.mark.parametrize("failing", ["discard", "remove"])
def test_one_that_cannot_be_taken_away_is_tried_again(desk: Desk, failing: str) -> None:
    """Once with an error of ours and once with a bug: neither forgets it."""
    desk.load(record_of("box", ":1.7"))
    silent = desk.silent
    silent.failures[failing] = [Failed("systemd does not answer"), KeyError("a bug")]
    seen: list[bool] = []

    async def scene() -> None:
        desk.watched.end(":1.7")
        while failing not in silent.calls:
            await loop.after(0.001)
        disposable = desk.disposables._all["box"]
        seen.extend([disposable.leaving, not disposable.gone.done(), desk.left == ["box"]])
        await gone(desk, "box")

    run(scene())
    assert seen == [True, True, True]
    assert silent.calls.count(failing) == 3
    assert (desk.left, desk.registry.find("box")) == ([], None)


def test_a_vm_that_is_up_all_the_same_is_not_forgotten(desk: Desk) -> None:
    desk.load(record_of("box"))
    desk.silent.ends = False

    async def scene() -> None:
        while len(desk.silent.calls) < 2:
            await loop.after(0.001)
        assert desk.silent.calls[:2] == ["discard", "discard"]
        desk.silent.ends = True
        await gone(desk, "box")

    run(scene())
    assert desk.silent.calls[-2:] == ["discard", "remove"]
    assert desk.silent.calls.count("remove") == 1
    assert desk.left == []


def test_the_time_between_attempts_grows_to_a_limit(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def after(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(keeper, "RETRY_SECONDS", 2.0)
    monkeypatch.setattr(loop, "after", after)
    desk.load(record_of("box"))
    desk.silent.failures["discard"] = [Failed("systemd does not answer")] * 10
    run(gone(desk, "box"))
    assert waits == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


def test_those_on_their_way_out_count(desk: Desk) -> None:
    names = [f"box{number}" for number in range(32)]  # twice the limit of 16
    desk.load(*(record_of(name) for name in names))
    desk.silent.failures["discard"] = [Failed("systemd does not answer")] * 64

    async def scene() -> None:
        while len(desk.silent.calls) < 32:
            await loop.after(0.001)
        with pytest.raises(Busy, match="still on their way out"):
            await desk.disposables.create(DisposableRequest("", 0, ":1.9"))
        for name in names:
            await gone(desk, name)

    run(scene())
    assert desk.left == []


def test_a_connection_is_watched_as_long_as_it_holds_one(desk: Desk) -> None:
    """The first was ended already: it goes at once, and the other's watch stays."""
    desk.load(record_of("one", ":1.7", ended=True), record_of("two", ":1.7"))
    run(gone(desk, "one"))
    assert list(desk.watched.names) == [":1.7"]
    desk.watched.end(":1.7")
    run(gone(desk, "two"))
    assert (desk.left, desk.watched.names) == ([], {})


def test_a_connection_that_holds_none_is_not_watched(desk: Desk) -> None:
    desk.load(record_of("one", ":1.7"), record_of("two", ":1.7", ":1.8"))

    async def scene() -> None:
        first, second = (desk.disposables._all[name] for name in ("one", "two"))
        await desk.disposables._destroy(first)
        assert sorted(desk.watched.names) == [":1.7", ":1.8"]
        await desk.disposables._destroy(second)

    run(scene())
    assert desk.watched.names == {}
