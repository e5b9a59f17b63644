"""What is read of recorded sysfs trees, and what is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from usb_tree import AUDIO, HUB, KEYBOARD, MOUSE, STORAGE, Plugged, UsbTree
from vmsilod.errors import Busy, Failed
from vmsilod.usb import handover
from vmsilod.usb.devices import UsbDevice, find_device, find_devices, node_of
from vmsilod.usb.usage import find_obstacles, is_block_claimed

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def tree(tmp_path: Path) -> UsbTree:
    return UsbTree(tmp_path)


def one(tree: UsbTree, name: str) -> UsbDevice:
    device = find_device(name, tree.root)
    assert device is not None
    return device


def test_a_desk_is_read_in_the_order_of_its_ports(tree: UsbTree) -> None:
    tree.plug(
        Plugged("1-10", 9, "046d:c31c", None, (b"Logitech", b"Keyboard"), interfaces=(KEYBOARD, MOUSE))
    )
    tree.plug(Plugged("1-2", 4, "05e3:0610", None, (b"", b"Hub"), device_class="09", interfaces=(HUB,)))
    tree.plug(Plugged("1-2.1", 5, serial=b"A1"))
    tree.plug(Plugged("1-2.3", 6, serial=b"B2", interfaces=(AUDIO, STORAGE)))
    devices = find_devices(tree.root)
    assert [device.name for device in devices] == ["1-2", "1-2.1", "1-2.3", "1-10"]
    assert [device.is_hub for device in devices] == [True, False, False, False]
    keyboard = devices[3]
    assert keyboard.kinds == ("keyboard", "mouse")
    assert keyboard.ids == "046d:c31c"
    stick, composite = devices[1], devices[2]
    assert stick.ids == "0951:1666:A1"
    assert stick.title == "Kingston DataTraveler 3.0"
    assert stick.host_drivers == ("usb-storage",)
    assert composite.kinds == ("audio", "storage")
    assert node_of(composite, Path("/dev")) == Path("/dev/bus/usb/001/006")


def test_a_host_without_usb_has_no_devices(tmp_path: Path) -> None:
    assert find_devices(tmp_path) == []


@pytest.mark.parametrize(
    "serial",
    [b"\x1b[2J", "naïve".encode(), b"\xff\xfe", b" A", b"A ", b"", b"x" * 127, b"a\nb", b"tab\there"],
)
def test_a_serial_number_that_could_look_like_another_counts_as_none(tree: UsbTree, serial: bytes) -> None:
    tree.plug(Plugged("1-1", 2, serial=serial))
    assert one(tree, "1-1").serial == ""


def test_names_that_a_device_sends_are_made_harmless(tree: UsbTree) -> None:
    tree.plug(Plugged("1-1", 2, title=(b"\x1b]0;owned\x07", "‮gpj.exe".encode() + b"\xff" * 900)))
    title = one(tree, "1-1").title
    assert title.isprintable()
    assert len(title) <= 126
    assert title.startswith("?]0;owned?")


@pytest.mark.parametrize("name", ["../../etc", "1-2:1.0", "usb1", "1-", "1-2.0", "1-2\n", ""])
def test_only_a_port_is_looked_at(tree: UsbTree, name: str) -> None:
    tree.plug(Plugged("1-2", 2))
    assert find_device(name, tree.root) is None


def test_a_device_whose_interfaces_are_not_there_yet_is_not_configured(tree: UsbTree) -> None:
    plugged = Plugged("1-1", 2, interfaces=(AUDIO, STORAGE), made=1)
    tree.plug(plugged)
    assert not one(tree, "1-1").configured
    plugged.made = 2
    tree.plug(plugged)
    assert one(tree, "1-1").configured


def test_each_plugging_in_is_another_whatever_its_numbers(tree: UsbTree) -> None:
    path = tree.plug(Plugged("1-1", 2, serial=b"A"))
    first = one(tree, "1-1")
    assert one(tree, "1-1").key == first.key
    path.rename(path.with_name("gone"))
    tree.plug(Plugged("1-1", 2, serial=b"A"))
    assert one(tree, "1-1").key != first.key


@pytest.mark.parametrize(("name", "content"), [("devnum", b"x"), ("idVendor", b"12"), ("busnum", b"")])
def test_a_device_on_its_way_out_is_left_out(tree: UsbTree, name: str, content: bytes) -> None:
    (tree.plug(Plugged("1-1", 2)) / name).write_bytes(content)
    assert find_devices(tree.root) == []


def in_use(*names: str) -> Callable[[Path], bool]:
    return lambda node: node.name in names


def test_a_disk_that_nobody_uses_may_go(tree: UsbTree) -> None:
    tree.plug(Plugged("1-1", 2))
    tree.add_disk("1-1", "sdy")
    assert find_obstacles(one(tree, "1-1"), tree.root, in_use()) == []
    assert find_obstacles(one(tree, "1-1"), tree.root, in_use("sdx")) == []


@pytest.mark.parametrize("part", ["sdy", "sdy1"])
def test_a_used_disk_or_partition_stays(tree: UsbTree, part: str) -> None:
    tree.plug(Plugged("1-1", 2, interfaces=(AUDIO, STORAGE)))
    tree.plug(Plugged("1-3", 3))
    tree.add_disk("1-3", "sdy", number="8:400")
    assert find_obstacles(one(tree, "1-3"), tree.root, in_use(part)) == ["the host uses /dev/sdy"]
    assert find_obstacles(one(tree, "1-1"), tree.root, in_use(part)) == []


def test_it_is_said_where_a_disk_is_mounted(tree: UsbTree) -> None:
    tree.plug(Plugged("1-1", 2))
    fields = Path("/proc/self/mountinfo").read_text().splitlines()[0].split(" ")
    tree.add_disk("1-1", "sdy", number=fields[2])
    (obstacle,) = find_obstacles(one(tree, "1-1"), tree.root, in_use("sdy"))
    assert obstacle == f"the host uses /dev/sdy: it is mounted on {fields[4]}"


def test_it_is_said_what_lies_above_a_disk(tree: UsbTree) -> None:
    tree.plug(Plugged("1-1", 2))
    disk = tree.add_disk("1-1", "sdy", number="8:400")
    (disk / "sdy1" / "holders" / "dm-0").mkdir()
    assert find_obstacles(one(tree, "1-1"), tree.root, in_use("sdy1")) == [
        "the host uses /dev/sdy: it is a part of dm-0"
    ]


def test_a_disk_that_is_gone_is_not_in_use(tmp_path: Path) -> None:
    assert not is_block_claimed(tmp_path / "sdz")


def test_a_node_of_another_device_is_never_handed_over(tree: UsbTree, tmp_path: Path) -> None:
    tree.plug(Plugged("1-1", 2))
    node = node_of(one(tree, "1-1"), tree.dev)
    node.parent.mkdir(parents=True)
    node.write_text("")
    with pytest.raises(Failed, match="not the node"):
        handover.open_device(one(tree, "1-1"), tree.dev, tree.root)
    node.unlink()
    node.symlink_to("/dev/null")
    with pytest.raises(Failed, match="cannot open"):
        handover.open_device(one(tree, "1-1"), tree.dev, tree.root)


def make_node(tree: UsbTree, device: UsbDevice, minor: int) -> None:
    node = node_of(device, tree.dev)
    node.parent.mkdir(parents=True)
    try:
        os.mknod(node, 0o600 | 0o020000, os.makedev(handover.USB_DEVICE_MAJOR, minor))
    except PermissionError:
        pytest.skip("needs CAP_MKNOD")


def test_a_device_that_left_meanwhile_is_told_as_such(tree: UsbTree) -> None:
    tree.plug(Plugged("1-1", 2))
    device = one(tree, "1-1")
    with pytest.raises(Busy, match="unplugged"):
        handover.open_device(device, tree.dev, tree.root)
    # A real node whose device does not exist: ENODEV, or ENXIO in a kernel without USB.
    make_node(tree, device, 1)
    with pytest.raises((Busy, Failed)) as caught:
        handover.open_device(device, tree.dev, tree.root)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno in (errno.ENODEV, errno.ENXIO)


def test_numbers_that_were_given_to_another_device_are_noticed(
    tree: UsbTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stick is opened; before sysfs is looked at again, another one has its port and its number."""
    tree.plug(Plugged("1-1", 2, serial=b"A"))
    device = one(tree, "1-1")
    tree.plug(Plugged("1-1", 2, serial=b"B"))
    real = os.open

    def open_null(path: Path, flags: int) -> int:
        return real("/dev/null", flags & ~os.O_NOFOLLOW)

    # No device node of USB can be opened without USB: the open and its check are the kernel's part.
    monkeypatch.setattr(os, "open", open_null)
    monkeypatch.setattr(handover, "check_node", lambda *_: None)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(Busy, match="unplugged"):
        handover.open_device(device, tree.dev, tree.root)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_host_drivers_are_unbound_interface_by_interface(tree: UsbTree) -> None:
    drivers = ("snd-usb-audio", "usb-storage")
    tree.plug(Plugged("1-1", 2, interfaces=(AUDIO, STORAGE), drivers=drivers))
    handover.take_from_host(one(tree, "1-1"), tree.root)
    assert tree.written("snd-usb-audio") == "1-1:1.0"
    assert tree.written("usb-storage") == "1-1:1.1"
    assert tree.probed() == ""


def test_what_a_program_of_the_host_has_open_is_not_taken(tree: UsbTree) -> None:
    tree.plug(Plugged("1-1", 2, interfaces=(AUDIO, STORAGE), drivers=("snd-usb-audio", "usbfs")))
    with pytest.raises(Busy, match="a program of the host uses"):
        handover.take_from_host(one(tree, "1-1"), tree.root)
    assert tree.written("snd-usb-audio") == ""


def test_only_interfaces_without_a_driver_are_given_back(tree: UsbTree) -> None:
    tree.plug(Plugged("1-1", 2, interfaces=(AUDIO, STORAGE), drivers=("snd-usb-audio", "")))
    handover.give_to_host(one(tree, "1-1"), tree.root)
    assert tree.probed() == "1-1:1.1"
