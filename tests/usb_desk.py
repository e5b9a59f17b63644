"""Running VMs as the USB part of vmsilod sees them: a recorded sysfs tree, records, and the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from main_loop import run
from usb_tree import UsbTree
from vmsilod import loop
from vmsilod.bus.views import Reloaded
from vmsilod.config.model import VmConfig
from vmsilod.registry import Registry, Vm
from vmsilod.resources.record import Record
from vmsilod.systemd import UnitState
from vmsilod.usb.attachments import UsbAttachments, UsbPlace

if TYPE_CHECKING:
    from pathlib import Path


class Desk:
    """A host: its devices, its VMs, and vmsilod's part in it, which can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.tree = UsbTree(directory)
        self.place = UsbPlace(self.tree.root, self.tree.dev, directory / "vm", directory / "usb-attached")
        self.registry = Registry()
        self.usb = UsbAttachments(self.registry, self.place)

    def start_vm(self, name: str, *, since: int = 1, vmm: str = "qemu", **config: Any) -> Vm:
        values = {
            "name": name, "user": "david", "memory": 64, "cpus": 1, "color": "red", "image": "default",
            "start_timeout": 9, "stop_timeout": 9, "usb": True, **config,
        }  # fmt: skip
        rules = [dict(zip(("vendor", "product", "serial"), text.split(":"), strict=False))
                 for text in values.pop("usb_devices", ())]  # fmt: skip
        made = VmConfig.model_validate({**values, "usb_devices": rules})
        vm = self.registry.adopt(name)
        vm.config = made
        invocation = f"{name}-{since}"
        vm.record = Record(name, "x", invocation, vmm=vmm, config=made.to_json(), launched=True)
        vm.unit = UnitState(active="active", sub="running", invocation=invocation, active_since=since)
        return vm

    def look(self) -> None:
        """What the watch and a change of a VM lead to."""
        self.usb.vm_changed(Reloaded(1, 0))
        run(self.settle())

    async def settle(self) -> None:
        while self.usb._stale:
            await loop.after(0.01)
        async with self.usb._lock:
            pass

    def restart_daemon(self) -> None:
        self.usb = UsbAttachments(self.registry, self.place)
        run(self.usb.load())
        run(self.usb.repair())
        run(self.settle())

    def holders(self) -> dict[str, str]:
        return {view.port: view.vm for view in run(self.usb.list_devices())}
