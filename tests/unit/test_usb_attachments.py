"""Devices in VMs over time: a recorded sysfs tree on one side, a real monitor socket on the other.

The one thing that is not real is the open of a device's node: these machines have no USB. The lab has.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from main_loop import run
from qmp_server import QmpServer
from usb_desk import Desk
from usb_tree import AUDIO, HUB, STORAGE, Plugged
from vmsilod import loop
from vmsilod.errors import BadRequest, Busy, NotRunning, VmsiloError
from vmsilod.systemd import INACTIVE
from vmsilod.usb import attachments, handover
from vmsilod.vmm.errors import MonitorTimeout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vmsilod.usb.attachments import UsbPlace
    from vmsilod.usb.devices import UsbDevice

STICK = Plugged("1-2", 5, serial=b"A1")
RULE = ("0951:1666:A1",)
Serve = Any


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    def take(device: UsbDevice, _returned: object, place: UsbPlace) -> int:
        handover.take_from_host(device, place.sysfs)
        return os.open("/dev/null", os.O_RDWR)

    monkeypatch.setattr(attachments, "_take_device", take)
    return Desk(tmp_path)


@pytest.fixture
def serve(desk: Desk) -> Iterator[Serve]:
    servers: list[QmpServer] = []

    def start(name: str, **options: Any) -> QmpServer:
        servers.append(QmpServer(desk.place.vm_dir / name / "monitor.sock", **options).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__(None, None, None)


def test_attach_and_detach(desk: Desk, serve: Serve) -> None:
    desk.start_vm("work")
    qemu = serve("work")
    desk.tree.plug(STICK)
    run(desk.usb.attach("work", "0951:1666"))
    assert qemu.devices == {"usbhost-1-5": "/dev/null"}
    assert desk.tree.written("usb-storage") == "1-2:1.0"
    assert desk.holders() == {"1-2": "work"}
    run(desk.usb.attach("work", "1-2"))
    assert len(qemu.devices) == 1
    run(desk.usb.detach("work", "1-2"))
    assert qemu.devices == {}
    desk.look()
    assert desk.holders() == {"1-2": ""}
    assert desk.tree.probed() == ""


def test_what_was_attached_by_hand_comes_back_after_a_replug(desk: Desk, serve: Serve) -> None:
    desk.start_vm("work")
    qemu = serve("work")
    desk.tree.plug(STICK)
    run(desk.usb.attach("work", "1-2"))
    desk.tree.unplug("1-2")
    desk.look()
    assert qemu.devices == {}
    desk.tree.plug(Plugged("1-7", 6, serial=b"B2"))
    desk.look()
    assert qemu.devices == {}
    desk.tree.plug(Plugged("1-3", 7, serial=b"A1"))
    desk.look()
    assert list(qemu.devices) == ["usbhost-1-7"]
    assert desk.holders() == {"1-3": "work", "1-7": ""}


def test_a_rule_attaches_when_the_device_is_whole_and_the_vm_runs(desk: Desk, serve: Serve) -> None:
    desk.tree.plug(Plugged("1-2", 5, serial=b"A1", made=0))
    desk.look()
    desk.start_vm("work", usb_devices=RULE, usb=False)
    qemu = serve("work")
    desk.look()
    assert qemu.devices == {}
    desk.tree.plug(STICK)
    desk.look()
    assert list(qemu.devices) == ["usbhost-1-5"]


def test_what_was_detached_by_hand_stays_out_until_it_is_attached_again(desk: Desk, serve: Serve) -> None:
    desk.start_vm("work", usb_devices=RULE)
    qemu = serve("work")
    desk.tree.plug(STICK)
    desk.look()
    run(desk.usb.detach("work", "1-2"))
    desk.tree.unplug("1-2")
    desk.look()
    desk.tree.plug(Plugged("1-2", 9, serial=b"A1"))
    desk.look()
    assert qemu.devices == {}
    run(desk.usb.attach("work", "1-2"))
    assert list(qemu.devices) == ["usbhost-1-9"]


def test_a_device_of_another_vm_is_not_taken_away(desk: Desk, serve: Serve) -> None:
    desk.start_vm("work", since=1, usb_devices=RULE)
    desk.start_vm("play", since=2, usb_devices=RULE)
    work, play = serve("work"), serve("play")
    desk.tree.plug(STICK)
    desk.look()
    assert (len(work.devices), len(play.devices)) == (1, 0)
    with pytest.raises(Busy, match="VM 'work' has"):
        run(desk.usb.attach("play", "1-2"))
    with pytest.raises(Busy, match="VM 'work' has"):
        run(desk.usb.release("1-2"))
    with pytest.raises(Busy, match="VM 'work' has") as caught:
        run(desk.usb.attach("play", "0951:1666:A1"))
    assert caught.value.hint == "vmsilo usb detach work 1-2"


def test_a_stopped_vm_has_nothing_and_the_next_in_line_gets_it(desk: Desk, serve: Serve) -> None:
    vm = desk.start_vm("work", since=1, usb_devices=RULE)
    desk.start_vm("play", since=2, usb_devices=RULE)
    serve("work")
    play = serve("play")
    desk.tree.plug(STICK)
    desk.look()
    vm.forget_run()
    vm.unit = INACTIVE
    desk.look()
    assert desk.holders() == {"1-2": "play"}
    assert len(play.devices) == 1


def test_a_killed_daemon_goes_on_with_what_the_vms_have(desk: Desk, serve: Serve) -> None:
    desk.start_vm("work")
    qemu = serve("work")
    desk.tree.plug(STICK)
    desk.tree.plug(Plugged("1-3", 6, serial=b"B2"))
    run(desk.usb.attach("work", "1-2"))
    run(desk.usb.attach("work", "1-3"))
    run(desk.usb.detach("work", "1-3"))
    qemu.devices["usbhost-1-99"] = "of an attach that was cut short"
    qemu.devices["balloon0"] = "none of ours"
    desk.restart_daemon()
    assert set(qemu.devices) == {"usbhost-1-5", "balloon0"}
    assert desk.holders() == {"1-2": "work", "1-3": ""}
    desk.tree.unplug("1-2")
    desk.look()
    desk.tree.plug(Plugged("1-2", 7, serial=b"A1"))
    desk.look()
    assert set(qemu.devices) == {"usbhost-1-7", "balloon0"}


def test_what_the_vmm_lost_meanwhile_is_attached_again(desk: Desk, serve: Serve) -> None:
    desk.start_vm("work")
    qemu = serve("work")
    desk.tree.plug(STICK)
    run(desk.usb.attach("work", "1-2"))
    qemu.devices.clear()
    desk.restart_daemon()
    assert list(qemu.devices) == ["usbhost-1-5"]


def test_a_file_of_another_run_or_of_nonsense_does_not_count(desk: Desk, serve: Serve) -> None:
    vm = desk.start_vm("work", since=1)
    qemu = serve("work")
    desk.tree.plug(STICK)
    run(desk.usb.attach("work", "1-2"))
    qemu.devices.clear()
    assert vm.record is not None
    desk.start_vm("work", since=2)
    desk.restart_daemon()
    assert desk.holders() == {"1-2": ""}
    for content in ("{", "[]", '{"work": {"invocation": 1}}', '{"work": 3}'):
        desk.place.state_file.write_text(content)
        desk.restart_daemon()
        assert desk.holders() == {"1-2": ""}


def test_a_host_driver_that_came_late_is_taken_off_again(desk: Desk, serve: Serve) -> None:
    desk.start_vm("work")
    serve("work")
    desk.tree.plug(Plugged("1-2", 5, serial=b"A1", drivers=()))
    run(desk.usb.attach("work", "1-2"))
    desk.tree.plug(Plugged("1-2", 5, serial=b"A1", drivers=("uas",)))
    desk.look()
    assert desk.tree.written("uas") == "1-2:1.0"


def test_a_late_host_driver_goes_though_the_vmm_holds_the_other_interfaces(
    desk: Desk, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    desk.start_vm("work")
    serve("work")
    three = (STORAGE, AUDIO, STORAGE)
    desk.tree.plug(Plugged("1-2", 5, serial=b"A1", interfaces=three, drivers=()))
    run(desk.usb.attach("work", "1-2"))
    drivers = ("usbfs", "snd-usb-audio", "uas")
    desk.tree.plug(Plugged("1-2", 5, serial=b"A1", interfaces=three, drivers=drivers))
    stuck = desk.tree.root / "bus/usb/drivers/snd-usb-audio/unbind"
    stuck.unlink()
    stuck.mkdir()
    desk.look()
    assert desk.tree.written("uas") == "1-2:1.2"
    assert desk.tree.written("usbfs") == ""
    assert "cannot write 1-2:1.1" in caplog.text


def test_a_vmm_that_refuses_is_not_asked_again_and_again(desk: Desk, serve: Serve) -> None:
    desk.start_vm("work", usb_devices=RULE)
    qemu = serve("work", refuse="device_add")
    desk.tree.plug(STICK)
    for _ in range(3):
        desk.look()
    assert qemu.commands.count("device_add") == 1
    with pytest.raises(VmsiloError, match="failed to open"):
        run(desk.usb.attach("work", "1-2"))


def test_a_device_is_given_to_the_host_only_on_request(desk: Desk, serve: Serve) -> None:
    vm = desk.start_vm("work", usb_devices=RULE)
    serve("work")
    desk.tree.plug(Plugged("1-2", 5, serial=b"A1", drivers=()))
    desk.look()
    run(desk.usb.detach("work", "1-2"))
    desk.look()
    assert desk.tree.probed() == ""
    vm.forget_run()
    vm.unit = INACTIVE
    desk.look()
    run(desk.usb.release("1-2"))
    assert desk.tree.probed() == "1-2:1.0"


def test_the_host_does_not_get_what_a_running_vm_may_still_hold(desk: Desk, serve: Serve) -> None:
    desk.start_vm("work")
    serve("work")
    desk.tree.plug(Plugged("1-2", 5, serial=b"A1", drivers=()))
    run(desk.usb.attach("work", "1-2"))
    run(desk.usb.detach("work", "1-2"))
    with pytest.raises(Busy, match="was in VM 'work', which could still use it") as caught:
        run(desk.usb.release("1-2"))
    assert caught.value.hint == "plug it out and in again, or vm-stop work"
    assert desk.tree.probed() == ""
    desk.tree.unplug("1-2")
    desk.tree.plug(Plugged("1-2", 6, serial=b"A1", drivers=()))
    run(desk.usb.release("1-2"))
    assert desk.tree.probed() == "1-2:1.0"


def test_no_other_vm_gets_what_a_running_vm_may_still_hold(desk: Desk, serve: Serve) -> None:
    vm = desk.start_vm("work")
    desk.start_vm("bank")
    work, bank = serve("work"), serve("bank")
    desk.tree.plug(STICK)
    run(desk.usb.attach("work", "1-2"))
    run(desk.usb.detach("work", "1-2"))
    for _ in range(2):
        with pytest.raises(Busy, match="was in VM 'work', which could still use it"):
            run(desk.usb.attach("bank", "1-2"))
        desk.restart_daemon()
    run(desk.usb.attach("work", "1-2"))
    run(desk.usb.detach("work", "1-2"))
    desk.tree.unplug("1-2")
    desk.tree.plug(Plugged("1-2", 6, serial=b"A1"))
    run(desk.usb.attach("bank", "1-2"))
    run(desk.usb.detach("bank", "1-2"))
    with pytest.raises(Busy, match="was in VM 'bank'"):
        run(desk.usb.attach("work", "1-2"))
    bank_vm = desk.registry.require("bank")
    bank_vm.forget_run()
    bank_vm.unit = INACTIVE
    desk.look()
    run(desk.usb.attach("work", "1-2"))
    assert vm.unit.active == "active"
    assert (len(work.devices), len(bank.devices)) == (1, 0)


def test_an_attach_that_is_answered_too_late_is_undone(
    desk: Desk, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attachments, "MONITOR_SECONDS", 0.3)
    monkeypatch.setattr(attachments, "UNSURE_SECONDS", 0.1)
    desk.start_vm("work")
    desk.start_vm("bank")
    qemu, bank = serve("work", slow=0.6), serve("bank")
    desk.tree.plug(STICK)
    with pytest.raises(MonitorTimeout):
        run(desk.usb.attach("work", "1-2"))
    with pytest.raises(Busy, match="was in VM 'work'"):
        run(desk.usb.attach("bank", "1-2"))

    async def until_undone() -> None:
        while "device_del" not in qemu.commands:
            await loop.after(0.05)
        await desk.settle()

    run(loop.with_deadline(until_undone(), 10))
    assert qemu.devices == bank.devices == {}
    run(desk.usb.attach("work", "1-2"))
    assert desk.holders() == {"1-2": "work"}


def test_what_a_rule_waits_for_is_not_given_to_the_host(desk: Desk, serve: Serve) -> None:
    desk.start_vm("work", usb_devices=RULE)
    serve("work", refuse="device_add")
    desk.tree.plug(Plugged("1-2", 5, serial=b"A1", drivers=()))
    desk.look()
    with pytest.raises(Busy, match="has the rule 0951:1666:A1"):
        run(desk.usb.release("1-2"))


def test_a_vm_that_cannot_have_it_says_why(desk: Desk) -> None:
    desk.tree.plug(STICK)
    desk.start_vm("plain", usb=False)
    with pytest.raises(BadRequest, match="without a USB controller") as caught:
        run(desk.usb.attach("plain", "1-2"))
    assert "usb = true" in caught.value.hint
    vm = desk.start_vm("off")
    vm.unit = INACTIVE
    with pytest.raises(NotRunning):
        run(desk.usb.attach("off", "1-2"))
    desk.start_vm("work")
    with pytest.raises(BadRequest, match="does not have"):
        run(desk.usb.detach("work", "1-2"))


def test_hubs_and_used_disks_stay(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    desk.start_vm("work", usb_devices=RULE)
    desk.tree.plug(Plugged("1-1", 3, "05e3:0610", device_class="09", interfaces=(HUB,)))
    with pytest.raises(BadRequest, match="is a hub"):
        run(desk.usb.attach("work", "1-1"))
    desk.tree.plug(STICK)
    desk.tree.add_disk("1-2", "sdy")
    monkeypatch.setattr("vmsilod.usb.usage.is_block_claimed", lambda node: node.name == "sdy1")
    with pytest.raises(Busy, match="the host uses /dev/sdy"):
        run(desk.usb.attach("work", "1-2"))
    desk.look()
    assert desk.holders() == {"1-1": "", "1-2": ""}
    assert desk.tree.written("usb-storage") == ""
    (stick,) = [view for view in run(desk.usb.list_devices()) if view.port == "1-2"]
    assert stick.obstacle == "the host uses /dev/sdy"
