"""Choice of the VMM, and the probe of /dev/kvm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from vmsilod.vmm.choose import VmmKind, choose_vmm, probe_kvm
from vmsilod.vmm.drivers import DRIVERS
from vmsilod.vmm.errors import KvmNeeded, MissingVmm

INSTALLED = {"crosvm": "/usr/local/bin/crosvm", "qemu-system-x86_64": "/usr/bin/qemu-system-x86_64"}


def test_auto_prefers_crosvm_and_says_so() -> None:
    choice = choose_vmm("auto", find=INSTALLED.get)
    assert (choice.kind, choice.binary) == (VmmKind.CROSVM, INSTALLED["crosvm"])
    assert "crosvm" in choice.reason


def test_auto_takes_qemu_without_crosvm_and_says_so() -> None:
    choice = choose_vmm("auto", find={"qemu-system-x86_64": "/q"}.get)
    assert (choice.kind, choice.binary) == (VmmKind.QEMU, "/q")
    assert "crosvm is not installed" in choice.reason


def test_configured_vmm_is_taken_though_crosvm_is_there() -> None:
    assert choose_vmm("qemu", find=INSTALLED.get).kind is VmmKind.QEMU


@pytest.mark.parametrize("wanted", ["auto", "crosvm", "qemu"])
def test_missing_vmm_names_a_way_out(wanted: str) -> None:
    with pytest.raises(MissingVmm) as caught:
        choose_vmm(wanted, find={}.get)  # type: ignore[arg-type]  # parametrised str of a Literal
    hint = caught.value.hint
    assert "qemu-system-x86" in hint or "crosvm has no Debian package" in hint


def test_configured_vmm_is_not_replaced_by_another() -> None:
    with pytest.raises(MissingVmm):
        choose_vmm("crosvm", find={"qemu-system-x86_64": "/q"}.get)


def test_crosvm_is_not_taken_where_it_cannot_run() -> None:
    choice = choose_vmm("auto", kvm=False, find=INSTALLED.get)
    assert choice.kind is VmmKind.QEMU
    assert "needs KVM" in choice.reason
    only_crosvm = {"crosvm": "/c"}
    for wanted in ("auto", "crosvm"):
        with pytest.raises(KvmNeeded):
            choose_vmm(wanted, kvm=False, find=only_crosvm.get)


def test_cloud_hypervisor_is_never_chosen_by_itself_and_needs_kvm() -> None:
    find = {"cloud-hypervisor": "/ch"}.get
    assert choose_vmm("cloud-hypervisor", find=find).binary == "/ch"
    with pytest.raises(MissingVmm):
        choose_vmm("auto", find=find)
    with pytest.raises(KvmNeeded):
        choose_vmm("cloud-hypervisor", kvm=False, find=find)


def test_every_kind_has_a_driver() -> None:
    assert set(DRIVERS) == set(VmmKind)


def test_kvm_that_is_not_there(tmp_path: Path) -> None:
    status = probe_kvm(str(tmp_path / "kvm"))
    assert not status.usable
    assert "No such file" in status.reason


@pytest.mark.parametrize("kind", ["file", "null"])
def test_kvm_that_is_something_else(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "kvm" if kind == "file" else Path(os.devnull)
    if kind == "file":
        path.touch()
    status = probe_kvm(str(path))
    assert not status.usable
    assert "is not KVM" in status.reason


def test_memory_that_grows_is_not_for_crosvm() -> None:
    choice = choose_vmm("auto", grows=True, find=INSTALLED.get)
    assert (choice.kind, choice.reason) == (VmmKind.QEMU, "crosvm cannot plug memory in")
    with pytest.raises(MissingVmm, match="memory_max needs qemu"):
        choose_vmm("auto", grows=True, find={"crosvm": "/c"}.get)
