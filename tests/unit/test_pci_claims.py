"""The PCI devices of this host as vmsilod's loop sees them: who waits for whom, and what stops nobody."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from main_loop import run
from pci_tree import NIC, PciTree, Spec, lone_nic
from vmsilod import loop
from vmsilod.pci.claims import PciClaims
from vmsilod.pci.state import State, save_state
from vmsilod.state_file import temporary_of

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


async def start_nothing(unit: str) -> str:
    return unit


def test_the_end_of_a_vm_without_devices_waits_for_no_other_device(tmp_path: Path) -> None:
    tree = PciTree(tmp_path, Spec(NIC, driver="e1000e", wants="e1000e", group=2), vfio=False)
    asked: Future[None] = Future()
    answer: Future[str] = Future()

    async def load_slowly(unit: str) -> str:
        asked.set_result(None)
        tree.load("vfio-pci")
        return await loop.wait_for(answer)

    async def go() -> None:
        claims = PciClaims(load_slowly, tree.roots, tmp_path / "state/devices/pci.json")
        claim = loop.spawn(claims.claim(NIC))
        await loop.wait_for(asked)
        await loop.with_deadline(claims.end("banking"), 5)
        assert not claim.done()
        answer.set_result("done")
        await loop.wait_for(claim)

    run(go())
    assert tree.driver(NIC) == "vfio-pci"


def test_a_repair_that_fails_is_told_and_vmsilod_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = lone_nic(tmp_path, driver="vfio-pci")
    file = tmp_path / "state/devices/pci.json"
    save_state(State("boot-1", held={NIC: "sys-net"}), file)
    claims = PciClaims(start_nothing, tree.roots, file)
    # Nothing can be saved any more.
    temporary_of(file).mkdir()
    run(claims.repair(()))
    assert "not all taken back: cannot write" in caplog.text
