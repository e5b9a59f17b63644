"""Which PCI devices a VM may have: recorded hosts, and what is said of each refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pci_tree import NIC, PciTree, Spec, chipset, lone_nic
from vmsilod.pci.address import parse_address
from vmsilod.pci.plan import (
    AwaitGroup,
    DeviceBusy,
    GiveGroup,
    Known,
    Operation,
    Override,
    Probe,
    Refused,
    Unbind,
    Wanted,
    plan_claim,
    plan_give_back,
    plan_isolation,
    plan_start,
)
from vmsilod.pci.topology import read_topology
from vmsilod.pci.usage import find_usage

if TYPE_CHECKING:
    from pathlib import Path

UID = 61000
PORT = "0000:00:02.0"


def plan(tree: PciTree, *addresses: str, vm: str = "sys-net", known: Known | None = None) -> list[Operation]:
    topology = read_topology(tree.roots)
    usage = find_usage(tree.roots, topology)
    return plan_start(topology, usage, known or Known(), Wanted(vm, UID, addresses))


def refusal(tree: PciTree, *addresses: str, known: Known | None = None) -> Refused:
    before = tree.snapshot()
    with pytest.raises(Refused) as caught:
        plan(tree, *addresses, known=known)
    assert tree.snapshot() == before
    assert not tree.writes
    return caught.value


def test_a_nic_alone_in_its_group_goes_from_the_host_to_the_vm(tmp_path: Path) -> None:
    assert plan(lone_nic(tmp_path), NIC) == [
        Unbind(NIC, "e1000e"),
        Override(NIC, "vfio-pci"),
        Probe(NIC, "vfio-pci"),
        AwaitGroup(2),
        GiveGroup(2, UID),
    ]


def test_one_that_vfio_has_already_is_only_handed_over(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path, driver="vfio-pci", extra={"driver_override": "vfio-pci\n"})
    assert plan(tree, NIC) == [AwaitGroup(2), GiveGroup(2, UID)]


def test_devices_are_named_as_lspci_names_them(tmp_path: Path) -> None:
    topology = read_topology(lone_nic(tmp_path).roots)
    nic = "Intel Corporation 82574L Gigabit Network Connection Ethernet controller [8086:10d3]"
    assert topology.functions[NIC].name == nic
    assert topology.functions["0000:00:1f.2"].name == "Intel Corporation SATA controller [8086:2922]"
    assert topology.functions[NIC].parent == PORT


def test_a_shared_group_is_refused_with_every_name(tmp_path: Path) -> None:
    error = refusal(lone_nic(tmp_path), "0000:00:1f.3")
    assert error.message.startswith("0000:00:1f.3 (Intel Corporation SMBus controller, driver i801_smbus)")
    assert "shares IOMMU group 4 with devices of the host: 0000:00:1f.0 (" in error.message
    assert "0000:00:1f.2 (Intel Corporation SATA controller, driver ahci)" in error.message
    assert NIC not in error.message
    assert "whole group" in error.hint


@pytest.mark.parametrize("driver", ["", "pci-stub"])
def test_a_group_without_host_drivers_is_fine(tmp_path: Path, driver: str) -> None:
    both = [Spec(f"0000:03:00.{n}", ids="8086:1533", group=7, driver=driver) for n in (0, 1)]
    assert GiveGroup(7, UID) in plan(PciTree(tmp_path, *both), "0000:03:00.0")


def test_a_mate_that_vfio_has_must_be_the_same_vms(tmp_path: Path) -> None:
    """The group's node opens it as well, so that a guest's VMM could take it without being given it."""
    both = [Spec(f"0000:03:00.{n}", ids="8086:1533", group=7, driver="vfio-pci") for n in (0, 1)]
    tree = PciTree(tmp_path, *both)
    for known in (Known(), Known(tainted={"0000:03:00.1": ("sys-net", "its reset failed")})):
        error = refusal(tree, "0000:03:00.0", known=known)
        assert "shares IOMMU group 7 with 0000:03:00.1 (" in error.message
        assert "list it in pci_devices too, or release it" in error.hint
    assert GiveGroup(7, UID) in plan(tree, "0000:03:00.0", "0000:03:00.1")


def test_a_nic_with_two_functions_needs_both(tmp_path: Path) -> None:
    ports = [Spec(f"0000:03:00.{n}", ids="8086:1533", group=7, driver="igb", wants="igb") for n in (0, 1)]
    tree = PciTree(tmp_path, *ports)
    assert "0000:03:00.1 (Intel Corporation I210" in refusal(tree, "0000:03:00.0").message
    operations = plan(tree, "0000:03:00.0", "0000:03:00.1")
    assert operations.count(GiveGroup(7, UID)) == 1
    assert [op.address for op in operations if isinstance(op, Probe)] == ["0000:03:00.0", "0000:03:00.1"]


def gpu(root: Path, **audio: object) -> PciTree:
    port = Spec("0000:00:01.0", "060400", "8086:1901", driver="pcieport", group=1)
    card = Spec("0000:01:00.0", "030000", "10de:1b80", group=1, resets="", parent=port.address)
    sound = Spec("0000:01:00.1", "040300", "10de:10f0", group=1, resets="", parent=port.address)
    for name, value in audio.items():
        setattr(sound, name, value)
    return PciTree(root, port, card, sound)


def test_a_gpu_is_reset_with_its_audio_function_or_not_at_all(tmp_path: Path) -> None:
    tree = gpu(tmp_path)
    error = refusal(tree, "0000:01:00.0")
    assert "cannot be reset" in error.message
    assert "only together with 0000:01:00.1 (" in error.message
    assert error.hint == "give all of them to this VM"
    assert GiveGroup(1, UID) in plan(tree, "0000:01:00.0", "0000:01:00.1")


def test_no_reset_method(tmp_path: Path) -> None:
    tree = PciTree(tmp_path, Spec("0000:00:05.0", group=3, resets=""))
    error = refusal(tree, "0000:00:05.0")
    assert "cannot be reset, so what one guest leaves in it would reach the next" in error.message


def test_no_iommu(tmp_path: Path) -> None:
    error = refusal(PciTree(tmp_path, Spec(NIC, driver="e1000e")), NIC)
    assert error.message.startswith("this host has no working IOMMU, so 0000:01:00.0 (")
    assert "intel_iommu=on" in error.hint


def test_an_iommu_without_interrupt_remapping(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    tree.put(
        "proc/interrupts", "  9:  0  0  IO-APIC  9-fasteoi acpi\n 24: 0 0 PCI-MSI-0000:01:00.0 enp1s0\n"
    )
    parameter = tree.put("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "N\n")
    error = refusal(tree, NIC)
    assert "does not remap interrupts, so 0000:01:00.0 (" in error.message
    assert "allow_unsafe_interrupts=1" in error.hint
    parameter.write_text("Y\n")
    assert plan(tree, NIC)
    parameter.write_text("N\n")
    tree.put("proc/interrupts", "  9:  0  0  IR-IO-APIC  9-fasteoi acpi\n")
    assert plan(tree, NIC)


def test_a_device_that_the_iommu_does_not_cover(tmp_path: Path) -> None:
    tree = PciTree(tmp_path, Spec(NIC), *chipset())
    assert "is in no IOMMU group" in refusal(tree, NIC).message


def test_a_bridge(tmp_path: Path) -> None:
    assert "is a bridge" in refusal(lone_nic(tmp_path), PORT).message


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    error = refusal(lone_nic(tmp_path), "0000:09:00.0")
    assert error.message == "there is no PCI device 0000:09:00.0"


def test_a_device_of_another_vm(tmp_path: Path) -> None:
    error = refusal(lone_nic(tmp_path), NIC, known=Known(held={NIC: "banking"}))
    assert error.message.endswith("is used by VM 'banking'")
    assert error.hint == "vm-stop banking"


def test_a_device_in_the_group_of_another_vms(tmp_path: Path) -> None:
    both = [Spec(f"0000:03:00.{n}", group=7, driver="vfio-pci") for n in (0, 1)]
    error = refusal(PciTree(tmp_path, *both), "0000:03:00.0", known=Known(held={"0000:03:00.1": "banking"}))
    assert "which is used by VM 'banking'" in error.message


def test_a_tainted_device_is_its_last_vms_alone(tmp_path: Path) -> None:
    known = Known(tainted={NIC: ("banking", "its reset failed: Inappropriate ioctl for device")})
    tree = lone_nic(tmp_path)
    error = refusal(tree, NIC, known=known)
    assert "is tainted: VM 'banking' had it, and its reset failed" in error.message
    assert plan(tree, NIC, vm="banking", known=known)


def disk(root: Path) -> PciTree:
    ids = "144d:a808"
    return PciTree(root, Spec("0000:04:00.0", "010802", ids, driver="nvme", wants="nvme", group=9))


@pytest.mark.parametrize(
    ("mountinfo", "fact"),
    [
        ("30 1 259:2 / / rw - ext4 /dev/nvme0n1p2 rw\n", "nvme0n1p2 is mounted on /"),
        ("30 1 0:31 / /home rw - btrfs /dev/nvme0n1p2 rw\n", "nvme0n1p2 is mounted on /home"),
    ],
)
def test_a_disk_with_a_mounted_file_system(tmp_path: Path, mountinfo: str, fact: str) -> None:
    tree = disk(tmp_path)
    tree.add_block("nvme0n1", "0000:04:00.0", number="259:0")
    tree.add_block("nvme0n1p2", "0000:04:00.0", number="259:2")
    tree.put("proc/1/mountinfo", mountinfo)
    error = refusal(tree, "0000:04:00.0")
    assert error.message.endswith(f"is in use by this host: {fact}")
    assert error.hint == "free it first"


def test_a_disk_with_swap_or_below_a_mapping(tmp_path: Path) -> None:
    tree = disk(tmp_path)
    tree.add_block("nvme0n1p3", "0000:04:00.0", number="259:3")
    tree.add_block("nvme0n1p4", "0000:04:00.0", number="259:4", holders="dm-0")
    tree.put("proc/swaps", "Filename Type\n/dev/nvme0n1p3 partition 1 0 -2\n")
    fact = refusal(tree, "0000:04:00.0").message
    assert "nvme0n1p3 is swap space; nvme0n1p4 is a part of dm-0" in fact


def test_a_disk_of_several_paths(tmp_path: Path) -> None:
    tree = disk(tmp_path)
    folder = tmp_path / "sys/devices/virtual/nvme-subsystem/nvme-subsys0"
    (folder / "nvme0n1/holders").mkdir(parents=True)
    (folder / "nvme0n1/dev").write_text("259:0\n")
    (tree.device("0000:04:00.0") / "nvme/nvme0").mkdir(parents=True)
    (folder / "nvme0").symlink_to(tree.device("0000:04:00.0") / "nvme/nvme0")
    tree.link("sys/class/block/nvme0n1", folder / "nvme0n1")
    tree.put("proc/swaps", "Filename Type\n/dev/nvme0n1 partition 1 0 -2\n")
    assert "nvme0n1 is swap space" in refusal(tree, "0000:04:00.0").message


def test_an_idle_disk_can_be_taken(tmp_path: Path) -> None:
    tree = disk(tmp_path)
    tree.add_block("nvme0n1", "0000:04:00.0", number="259:0")
    assert Unbind("0000:04:00.0", "nvme") in plan(tree, "0000:04:00.0")


def test_the_link_with_the_default_route(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    tree.add_link("enp1s0", NIC)
    tree.add_link("enp0s31", "0000:00:1f.3")
    tree.add_default_route("enp1s0")
    error = refusal(tree, NIC)
    assert error.message.endswith("is in use by this host: enp1s0 has the default route")
    assert error.hint == "free it first"


def test_the_default_route_over_a_bridge_or_by_ipv6(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    tree.add_link("enp1s0", NIC, upper="br0")
    tree.add_link("enp0s31", "0000:00:1f.3")
    zeros = "0" * 32
    line = f"{zeros} 00 {zeros} 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003"
    tree.put("proc/net/ipv6_route", f"{line} br0\n{zeros} 00 {zeros} 00 {zeros} ffffffff 1 0 00200200 lo\n")
    assert "enp1s0 has the default route" in refusal(tree, NIC).message


def test_the_only_link_that_is_up(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    tree.add_link("enp1s0", NIC)
    tree.add_link("enp0s31", "0000:00:1f.3", "down")
    assert "enp1s0 is the only network link that is up" in refusal(tree, NIC).message


def test_a_link_beside_another_can_be_taken(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    tree.add_link("enp1s0", NIC)
    tree.add_link("enp0s31", "0000:00:1f.3")
    assert Unbind(NIC, "e1000e") in plan(tree, NIC)


@pytest.mark.parametrize(
    ("extra", "fact"),
    [
        ({"boot_vga": "1\n"}, "is the console's graphics card"),
        (
            {"drm/card1/card1-DP-1/status": "connected\n", "drm/card1/card1-DP-1/enabled": "enabled\n"},
            "shows a picture on DP-1",
        ),
        ({"graphics/fb0/name": "amdgpudrmfb\n"}, "is the console (fb0)"),
    ],
)
def test_the_gpu_of_the_console(tmp_path: Path, extra: dict[str, str], fact: str) -> None:
    card = Spec("0000:05:00.0", "030000", "1002:73bf", driver="amdgpu", group=3, extra=extra)
    error = refusal(PciTree(tmp_path, card), "0000:05:00.0")
    assert fact in error.message
    assert "isolated_pci_devices" in error.hint


def test_a_gpu_that_was_isolated_at_boot_is_nobodys_console(tmp_path: Path) -> None:
    card = Spec("0000:05:00.0", "030000", "1002:73bf", driver="vfio-pci", group=3, extra={"boot_vga": "1\n"})
    assert GiveGroup(3, UID) in plan(PciTree(tmp_path, card), "0000:05:00.0")


def test_a_virtual_function_can_be_taken_and_not_the_card_that_has_it(tmp_path: Path) -> None:
    card = Spec("0000:06:00.0", driver="igb", wants="igb", group=10, extra={"sriov_numvfs": "2\n"})
    part = Spec("0000:06:10.0", driver="igbvf", wants="igbvf", group=11)
    tree = PciTree(tmp_path, card, part)
    assert "has 2 virtual functions" in refusal(tree, "0000:06:00.0").message
    assert GiveGroup(11, UID) in plan(tree, "0000:06:10.0")


def test_a_usb_controller_with_the_only_keyboard_is_a_warning(tmp_path: Path) -> None:
    address = "0000:00:14.0"
    tree = PciTree(tmp_path, Spec(address, "0c0330", driver="xhci_hcd", wants="xhci_hcd", group=5))
    path = tree.device(address) / "usb1/1-1/input/input3"
    (path / "capabilities").mkdir(parents=True)
    (path / "capabilities/key").write_text("10000 7 ff9f207ac14057ff febeffdfffefffff fffffffffffffffe\n")
    (path / "event3").mkdir()
    (path / "event3/device").symlink_to(path)
    tree.link("sys/class/input/event3", path / "event3")
    topology = read_topology(tree.roots)
    assert find_usage(tree.roots, topology).warnings == {address: ("has the only keyboard of this host",)}
    assert plan(tree, address)


def test_what_is_in_use_cannot_be_claimed_either(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    tree.add_link("enp1s0", NIC)
    topology = read_topology(tree.roots)
    with pytest.raises(Refused, match="only network link"):
        plan_claim(topology, find_usage(tree.roots, topology), Known(), NIC)


def test_a_claim_asks_nothing_of_the_rest_of_the_group(tmp_path: Path) -> None:
    topology = read_topology(lone_nic(tmp_path).roots)
    usage = find_usage(lone_nic(tmp_path / "again").roots, topology)
    assert Unbind("0000:00:1f.3", "i801_smbus") in plan_claim(topology, usage, Known(), "0000:00:1f.3")


def test_no_device_joins_a_group_that_a_vm_can_open(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path)
    topology = read_topology(tree.roots)
    held = Known(held={"0000:00:1f.0": "work"})
    with pytest.raises(DeviceBusy, match="is used by VM 'work'"):
        plan_claim(topology, find_usage(tree.roots, topology), held, "0000:00:1f.3")


def test_giving_back(tmp_path: Path) -> None:
    tree = lone_nic(tmp_path, driver="vfio-pci", extra={"driver_override": "vfio-pci\n"})
    topology = read_topology(tree.roots)
    operations = plan_give_back(topology, Known(), NIC)
    assert operations[:3] == [Unbind(NIC, "vfio-pci"), Override(NIC, "", "vfio-pci"), Probe(NIC)]
    with pytest.raises(DeviceBusy, match="used by VM 'a'"):
        plan_give_back(topology, Known(held={NIC: "a"}), NIC)
    with pytest.raises(DeviceBusy, match="tainted: VM 'a' had it, and x") as caught:
        plan_give_back(topology, Known(tainted={NIC: ("a", "x")}), NIC)
    assert "next boot" in caught.value.hint


def test_nothing_of_a_group_that_a_vm_has_a_part_of_is_given_back(tmp_path: Path) -> None:
    both = [Spec(f"0000:03:00.{n}", group=7, driver="vfio-pci") for n in (0, 1)]
    topology = read_topology(PciTree(tmp_path, *both).roots)
    with pytest.raises(DeviceBusy, match=r"with 0000:03:00\.1 .* used by VM 'a'") as caught:
        plan_give_back(topology, Known(held={"0000:03:00.1": "a"}), "0000:03:00.0")
    assert caught.value.hint == "vm-stop a"
    assert plan_give_back(topology, Known(), "0000:03:00.0")


def test_at_boot_a_device_without_a_driver_is_kept_from_the_hosts_even_without_iommu(tmp_path: Path) -> None:
    tree = PciTree(tmp_path, Spec(NIC, wants="e1000e"))
    topology = read_topology(tree.roots)
    assert plan_isolation(topology, find_usage(tree.roots, topology), NIC) == [
        Override(NIC, "vfio-pci"),
        Probe(NIC),
    ]


@pytest.mark.parametrize("text", ["01:00.0", "0000:01:00.0", "00000000:01:00.0"])
def test_an_address_with_or_without_domain(text: str) -> None:
    assert parse_address(text) == NIC


@pytest.mark.parametrize(
    "text", ["", "1:0.0", "01:00", "01:20.0", "01:00.8", "../x", "01:00.0\n", "01.00.0"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="is not a PCI address"):
        parse_address(text)


def test_letters_are_small() -> None:
    assert parse_address("C1:1F.7") == "0000:c1:1f.7"
