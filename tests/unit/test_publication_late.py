"""A VM whose network device comes after vmsilod: who starts then, and who does not. Only what decides that
is real here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
from main_loop import run
from vmsilod import loop, publication
from vmsilod.config.model import VmConfig
from vmsilod.errors import Failed
from vmsilod.publication import Publication
from vmsilod.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = {
    **{"user": "root", "memory": 512, "cpus": 1, "color": "red", "image": "default"},
    **{"start_timeout": 9, "stop_timeout": 9},
}


class Systemd:
    def __init__(self) -> None:
        self.started: list[str] = []

    async def start(self, unit: str) -> str:
        self.started.append(unit)
        if "masked" in unit:
            raise Failed("the unit is masked")
        return "done"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Publication, Registry, Systemd]:
    """With VMs that are all broken until `late0` is there."""
    monkeypatch.setattr(publication, "SYS_NET", tmp_path)
    monkeypatch.setattr(publication, "BOOTED_MARK", tmp_path / "booted")
    registry, systemd = Registry(), Systemd()
    publisher = Publication(registry, *cast("tuple[Any, ...]", (systemd, None, None)))

    async def reload() -> list[Any]:
        for vm in registry:
            auto = vm.name != "plain"
            vm.config = VmConfig.model_validate({**CONFIG, "name": vm.name, "auto_start": auto})
        return []

    monkeypatch.setattr(publisher, "reload", reload)
    for name in ("auto", "masked", "other", "plain"):
        registry.adopt(name)
    publisher._awaited = frozenset({"late0"})
    return publisher, registry, systemd


def touch(publisher: Publication) -> None:
    async def go() -> None:
        publisher.links_touched()
        await loop.after(0.05)

    run(go())


def test_who_was_owed_a_start_gets_it(made: tuple[Publication, Registry, Systemd], tmp_path: Path) -> None:
    publisher, registry, systemd = made
    run(publisher.start_autostart_vms())
    systemd.started.clear()
    touch(publisher)
    assert systemd.started == []  # it is not there yet
    (tmp_path / "late0").mkdir()
    registry.require("other").debug = True
    touch(publisher)
    assert systemd.started == ["vmsilo-auto-vm.service", "vmsilo-masked-vm.service"]
    touch(publisher)
    assert len(systemd.started) == 2


def test_what_comes_back_later_starts_nothing(
    made: tuple[Publication, Registry, Systemd], tmp_path: Path
) -> None:
    """A network card that is plugged in again says nothing of VMs that somebody has stopped."""
    publisher, _, systemd = made
    (tmp_path / "booted").touch()
    run(publisher.start_autostart_vms())
    (tmp_path / "late0").mkdir()
    touch(publisher)
    assert systemd.started == []
