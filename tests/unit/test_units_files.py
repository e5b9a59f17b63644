"""Unit files on disk: written where they differ, removed where no VM wants them, others' files left
alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsilod.units.files import MARK, write_units
from vmsilod.units.render import RenderedUnits

if TYPE_CHECKING:
    from pathlib import Path

NOBODY: frozenset[str] = frozenset()


def units(name: str, text: str = "", *, auto_start: bool = False) -> RenderedUnits:
    service = f"vmsilo-{name}-vm.service"
    files = dict.fromkeys((f"vmsilo-{name}.socket", service), f"{MARK} {text}\n")
    return RenderedUnits(
        files, {f"vmsilo-vms.target.wants/{service}": f"../{service}"} if auto_start else {}
    )


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    wanted = {"banking": units("banking", auto_start=True)}
    assert write_units(wanted, NOBODY, tmp_path).any
    again = write_units(wanted, NOBODY, tmp_path)
    assert not again.any
    assert (tmp_path / "vmsilo-vms.target.wants/vmsilo-banking-vm.service").resolve().is_file()


def test_a_changed_text_is_named(tmp_path: Path) -> None:
    write_units({"banking": units("banking", "old")}, NOBODY, tmp_path)
    change = write_units({"banking": units("banking", "new")}, NOBODY, tmp_path)
    assert change.changed == {"vmsilo-banking.socket", "vmsilo-banking-vm.service"}


def test_what_nobody_wants_goes_and_what_is_kept_stays(tmp_path: Path) -> None:
    everyone = {name: units(name, auto_start=True) for name in ("banking", "work", "a-vm")}
    write_units(everyone, NOBODY, tmp_path)
    change = write_units({"a-vm": everyone["a-vm"]}, frozenset({"work"}), tmp_path)
    assert change.removed == {"vmsilo-banking.socket", "vmsilo-banking-vm.service"}
    left = {path.name for path in tmp_path.glob("vmsilo-*.s*")}
    assert left == {
        *(f"vmsilo-{name}.socket" for name in ("work", "a-vm")),
        *(f"vmsilo-{name}-vm.service" for name in ("work", "a-vm")),
    }
    assert {path.name for path in (tmp_path / "vmsilo-vms.target.wants").iterdir()} == {
        "vmsilo-work-vm.service",
        "vmsilo-a-vm-vm.service",
    }


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in ("vmsilo-mine.socket", "other.service"):
        (tmp_path / name).write_text("[Unit]\n# not generated\n")
    assert not write_units({}, NOBODY, tmp_path).any
    assert len(list(tmp_path.iterdir())) == 2
