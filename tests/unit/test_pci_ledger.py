"""Devices taken, given to VMs and taken back on a kernel that reacts, fails and is cut off half-way."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from typing import TYPE_CHECKING

import pytest
from pci_tree import NIC, PciTree, Spec, lone_nic
from vmsilod.errors import VmsiloError
from vmsilod.pci import binding
from vmsilod.pci.ledger import Ledger
from vmsilod.pci.plan import DeviceBusy, Refused, Wanted
from vmsilod.pci.state import load_state

if TYPE_CHECKING:
    from pathlib import Path

    from vmsilod.pci.ledger import PciView
    from vmsilod.pci.roots import Roots

UID = 61000
SECOND = "0000:01:00.1"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="giving a file to another uid needs root")


def ledger_of(tree: PciTree) -> Ledger:
    return Ledger(tree.roots, tree.root / "state/devices/pci.json")


def start(tree: PciTree, vm: str = "sys-net", *addresses: str) -> Ledger:
    ledger = ledger_of(tree)
    ledger.start(Wanted(vm, UID, addresses or (NIC,)))
    return ledger


def view(ledger: Ledger, address: str = NIC) -> PciView:
    (found,) = (view for view in ledger.find_views((NIC,)) if view.address == address)
    return found


def two_nics(root: Path) -> PciTree:
    return PciTree(root, *(Spec(address, driver="igb", wants="igb", group=7) for address in (NIC, SECOND)))


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    ledger = start(tree)
    assert tree.driver(NIC) == "vfio-pci"
    status = tree.node(2).stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (UID, 0, 0o600)
    assert (view(ledger).state, view(ledger).vm) == ("used", "sys-net")
    assert view(ledger).note == "was with e1000e"
    assert [name for name, _ in tree.writes] == [
        "bus/pci/drivers/e1000e/unbind",
        f"bus/pci/devices/{NIC}/driver_override",
        "bus/pci/drivers_probe",
    ]
    ledger.end("sys-net")
    assert tree.node(2).stat().st_uid == 0
    assert tree.writes[-1] == (f"bus/pci/devices/{NIC}/reset", "1")
    assert tree.driver(NIC) == "vfio-pci", "a device that a guest had goes to no driver of the host"
    assert (view(ledger).state, view(ledger).vm) == ("claimed", "")
    assert ledger.give_back(NIC, isolated=False) == "e1000e"
    assert tree.snapshot()[NIC] == ("e1000e", "")


def test_nobody_ever_writes_new_id(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    ledger = start(tree)
    ledger.end("sys-net")
    ledger.give_back(NIC, isolated=False)
    assert not [name for name, _ in tree.writes if "new_id" in name]


@pytest.mark.parametrize("step", range(6))
def test_each_step_that_fails_is_undone(tmp_path: Path, step: int) -> None:
    tree = two_nics(tmp_path)
    before = tree.snapshot()
    tree.fail_at = step
    with pytest.raises(binding.BindingFailed, match="Input/output error"):
        start(tree, "sys-net", NIC, SECOND)
    assert tree.snapshot() == before
    assert not tree.node(7).exists()
    state = load_state(tmp_path / "state/devices/pci.json", tmp_path / "proc/sys/kernel/random/boot_id")
    assert not state.pending
    assert not state.held
    tree.fail_at = None
    ledger = start(tree, "sys-net", NIC, SECOND)
    assert view(ledger).state == "used"


def test_a_device_that_vfio_does_not_take_goes_back(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    tree.stubborn.add(NIC)
    with pytest.raises(binding.BindingFailed, match=f"vfio-pci does not take {NIC}"):
        start(tree)
    assert tree.snapshot()[NIC] == ("e1000e", "")


def test_a_group_without_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "GROUP_SECONDS", 0.05)
    tree = lone_nic(tmp_path, driver="vfio-pci", extra={"driver_override": "vfio-pci\n"})
    tree.node(2).unlink()
    with pytest.raises(binding.BindingFailed, match="did not appear"):
        start(tree)
    assert view(ledger_of(tree)).state == "claimed"


@pytest.mark.parametrize("step", range(6))
def test_a_start_that_was_cut_off_is_undone_by_the_next_vmsilod(tmp_path: Path, step: int) -> None:
    """kill -9 runs no undo: the state is put back to what the file had said at that moment."""
    tree = two_nics(tmp_path)
    before = tree.snapshot()
    file = tmp_path / "state/devices/pci.json"
    saved: list[bytes] = []

    def write(path: Path, text: str) -> None:
        if saved:
            raise OSError(errno.EIO, "this vmsilod is dead")  # so that its undoing reaches nothing
        tree.write(path, text)
        if len(tree.writes) > step:
            saved.append(file.read_bytes())

    dying = Ledger(dataclasses.replace(tree.roots, write=write), file)
    with contextlib.suppress(VmsiloError):
        dying.start(Wanted("sys-net", UID, (NIC, SECOND)))
    file.write_bytes(saved[0])
    ledger_of(tree).repair(("sys-net",))
    assert tree.snapshot() == before
    assert not load_state(file, tmp_path / "proc/sys/kernel/random/boot_id").held


def test_the_end_of_a_run_whose_claim_was_cut_off_undoes_the_claim(tmp_path: Path) -> None:
    """No guest has had the device: it goes to the host's driver again, and nobody resets it below that."""
    tree = lone_nic(tmp_path)
    before = tree.snapshot()
    file = tmp_path / "state/devices/pci.json"
    saved: list[bytes] = []

    def write(path: Path, text: str) -> None:
        if saved:
            raise OSError(errno.EIO, "this vmsilod is dead")
        tree.write(path, text)
        saved.append(file.read_bytes())

    with contextlib.suppress(VmsiloError):
        Ledger(dataclasses.replace(tree.roots, write=write), file).start(Wanted("sys-net", UID, (NIC,)))
    file.write_bytes(saved[0])
    ledger_of(tree).end("sys-net")
    assert tree.snapshot() == before
    assert not [name for name, _ in tree.writes if name.endswith("/reset")]


def test_what_an_ended_run_had_is_taken_back_by_the_next_vmsilod(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    start(tree)
    ledger = ledger_of(tree)
    ledger.repair(("sys-net",))
    assert tree.node(2).stat().st_uid == UID, "its VM runs"
    ledger.repair(("banking",))
    assert tree.node(2).stat().st_uid == 0
    assert tree.writes[-1] == (f"bus/pci/devices/{NIC}/reset", "1")
    assert view(ledger_of(tree)).state == "claimed"


def test_one_device_that_cannot_be_taken_back_holds_up_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = lone_nic(tmp_path)
    start(tree)
    ledger = ledger_of(tree)
    ledger._state.held["0000:00:1f.3"] = "a-broken-one"
    take_back = binding.take_group_back

    def take_group_back(group: int, roots: Roots) -> None:
        if group != 2:
            raise VmsiloError("no")
        take_back(group, roots)

    monkeypatch.setattr(binding, "take_group_back", take_group_back)
    ledger.repair(())
    assert tree.node(2).stat().st_uid == 0
    assert list(ledger._state.held.values()) == ["a-broken-one"]
    assert "VM a-broken-one: its PCI devices are not all taken back: no" in caplog.text


def test_a_second_vm_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    ledger = start(tree)
    with pytest.raises(Refused, match="used by VM 'sys-net'"):
        ledger.start(Wanted("banking", UID + 1, (NIC,)))
    with pytest.raises(DeviceBusy, match="used by VM 'sys-net'"):
        ledger.give_back(NIC, isolated=False)
    assert tree.node(2).stat().st_uid == UID
    assert view(ledger).vm == "sys-net"
    ledger.end("sys-net")
    ledger.start(Wanted("banking", UID + 1, (NIC,)))
    assert tree.node(2).stat().st_uid == UID + 1


def test_a_device_whose_reset_fails_is_tainted_until_the_boot_ends(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    ledger = start(tree)
    (tree.device(NIC) / "reset").write_text("broken")
    ledger.end("sys-net")
    assert (view(ledger).state, view(ledger).vm) == ("tainted", "sys-net")
    assert "its reset failed" in view(ledger).note
    with pytest.raises(Refused, match="tainted"):
        ledger_of(tree).start(Wanted("banking", UID, (NIC,)))
    with pytest.raises(DeviceBusy, match="tainted"):
        ledger.give_back(NIC, isolated=False)
    ledger.start(Wanted("sys-net", UID, (NIC,)))
    (tree.device(NIC) / "reset").write_text("")
    ledger.end("sys-net")
    assert view(ledger).state == "claimed", "a reset that works makes it clean"
    (tree.device(NIC) / "reset").write_text("broken")
    ledger.start(Wanted("sys-net", UID, (NIC,)))
    ledger.end("sys-net")
    tree.put("proc/sys/kernel/random/boot_id", "boot-2\n")
    assert view(ledger_of(tree)).state == "claimed"


def test_what_only_its_bus_can_reset_is_tainted_where_the_kernel_cannot_be_asked(tmp_path: Path) -> None:
    port = Spec("0000:00:01.0", "060400", group=1, driver="pcieport")
    card = Spec(NIC, "030000", group=1, resets="", parent=port.address)
    tree = PciTree(tmp_path, port, card)
    ledger = start(tree)
    ledger.end("sys-net")
    assert view(ledger).state == "tainted"
    (tree.device(port.address) / "reset_subordinate").touch()
    ledger.start(Wanted("sys-net", UID, (NIC,)))
    ledger.end("sys-net")
    assert view(ledger).state == "claimed"


def test_a_device_that_was_pulled_out_is_tainted(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    ledger = start(tree)
    link = tmp_path / "sys/bus/pci/devices" / NIC
    link.unlink()
    tree.node(2).unlink()
    ledger.end("sys-net")
    with pytest.raises(Refused, match="there is no PCI device"):
        ledger.start(Wanted("sys-net", UID, (NIC,)))
    link.symlink_to(tree.device(NIC))
    tree.node(2).touch()
    assert (view(ledger).state, view(ledger).vm) == ("tainted", "sys-net")
    with pytest.raises(Refused, match="it vanished, so it could not be reset"):
        ledger.start(Wanted("banking", UID, (NIC,)))


def test_isolation_takes_what_is_free_and_tells_of_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = lone_nic(tmp_path)
    tree.add_link("enp0s31", "0000:00:1f.3")
    ledger = ledger_of(tree)
    ledger.isolate((NIC, "0000:00:1f.3", "0000:0a:00.0"))
    assert tree.driver(NIC) == "vfio-pci"
    assert tree.driver("0000:00:1f.3") == "i801_smbus"
    assert "0000:00:1f.3 is not claimed" in caplog.text
    assert "0000:0a:00.0 is not claimed: there is no PCI device" in caplog.text
    assert view(ledger).isolated


def test_what_a_person_gave_back_is_not_isolated_again_in_this_boot(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    ledger = ledger_of(tree)
    ledger.isolate((NIC,))
    ledger.give_back(NIC, isolated=True)
    ledger_of(tree).isolate((NIC,))
    assert tree.driver(NIC) == "e1000e"
    assert view(ledger).note == "released until the next boot"
    ledger.claim(NIC)
    assert tree.driver(NIC) == "vfio-pci"


def test_what_was_given_back_before_it_was_isolated_is_isolated(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    ledger = ledger_of(tree)
    ledger.claim(NIC)
    ledger.give_back(NIC, isolated=False)
    ledger.isolate((NIC,))
    assert tree.driver(NIC) == "vfio-pci"


def test_a_state_file_of_no_use_is_none(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    file = tmp_path / "state/devices/pci.json"
    file.parent.mkdir(parents=True)
    for text in ("", "[]", '{"boot": "boot-1", "pending": 1}', '{"boot": "boot-1", "pending": {"x": []}}'):
        file.write_text(text)
        assert view(ledger_of(tree)).state == "host"
