"""The one table from bus method to polkit action, and what the question about a call tells polkit.

Called for every message before anything else is done with it. A method that is not in the table is
refused, and so are property writes, which are not in it on purpose. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmsilod.bus.names import check_name
from vmsilod.bus.requests import describe_command
from vmsilod.errors import BadRequest, Denied
from vmsilod.pci.address import parse_address

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

VIEW = "org.vmsilo1.view"
START = "org.vmsilo1.start"
STOP = "org.vmsilo1.stop"
KILL = "org.vmsilo1.kill"
RUN = "org.vmsilo1.run"
RUN_AS_ROOT = "org.vmsilo1.run-as-root"
DEBUG = "org.vmsilo1.debug"
RELOAD = "org.vmsilo1.reload"
MANAGE_DEVICES = "org.vmsilo1.manage-devices"
CREATE_DISPOSABLE = "org.vmsilo1.create-disposable"
SHARE_DIRECTORY = "org.vmsilo1.share-directory"
MANAGE_DISKS = "org.vmsilo1.manage-disks"
ACTIONS = (
    *(VIEW, START, STOP, KILL, RUN, RUN_AS_ROOT, DEBUG, RELOAD, MANAGE_DEVICES, MANAGE_DISKS),
    *(CREATE_DISPOSABLE, SHARE_DIRECTORY),
)

MANAGER_INTERFACE = "org.vmsilo1.Manager"
VM_INTERFACE = "org.vmsilo1.VM"
# The detail `vm` of a disposable of the default template.
DEFAULT_TEMPLATE = "(default)"
# The detail `command` of a login by ssh, which can run any.
SSH_COMMAND = "(any, by ssh)"

PROPERTIES_INTERFACE = "org.freedesktop.DBus.Properties"
OBJECTS_INTERFACE = "org.freedesktop.DBus.ObjectManager"


@dataclass(frozen=True)
class Message:
    """A method call as it came; `vm` is the VM whose object it was sent to, None at the root object."""

    interface: str
    method: str
    vm: str | None
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Need:
    """What a caller needs for a call: every one of the actions, asked with these details."""

    actions: tuple[str, ...]
    details: dict[str, str]


def classify(message: Message) -> Need:
    """What this call needs.

    Denied for an undeclared method, BadRequest where it can't be put into a question.
    """
    build = _TABLE.get((message.interface, message.method))
    if build is None:
        raise Denied(f"{message.interface}.{message.method} is not open to anyone")
    return build(message)


def _of_all(*actions: str) -> Callable[[Message], Need]:
    return lambda message: Need(actions, {} if message.vm is None else {"vm": message.vm})


def _of_named(*actions: str) -> Callable[[Message], Need]:
    """For the root object's methods, whose first argument is the name."""
    return lambda message: Need(actions, {"vm": check_name(message.arguments[0])})


def _of_device(message: Message) -> Need:
    return Need((MANAGE_DEVICES,), {"device": _check_device(message.arguments[0])})


def _check_device(text: str) -> str:
    try:
        return parse_address(text)
    except ValueError as error:
        raise BadRequest(str(error)) from error


def _of_run(message: Message) -> Need:
    *name, argv, options = message.arguments
    return _of_login(message, name, options, describe_command(argv))


def _of_ssh(message: Message) -> Need:
    *name, options = message.arguments
    return _of_login(message, name, options, SSH_COMMAND)


def _of_login(message: Message, name: Sequence[str], options: Mapping[str, Any], command: str) -> Need:
    root = options.get("root", False)
    if type(root) is not bool:
        raise BadRequest("option 'root' is not of type bool")
    vm = check_name(name[0]) if message.vm is None else message.vm
    return Need((RUN_AS_ROOT if root else RUN,), {"vm": vm, "command": command})


def _of_usb(message: Message) -> Need:
    """The device's address is the last argument; a VM's name comes before it where there is one."""
    *name, address = message.arguments
    vm = {"vm": check_name(name[0])} if name else {}
    return Need((MANAGE_DEVICES,), {**vm, "device": describe_command([address])})


def _of_listed(message: Message) -> Need:
    """The name may be "", for all VMs."""
    (name,) = message.arguments
    return Need((VIEW,), {"vm": check_name(name)} if name else {})


def _of_disk(message: Message) -> Need:
    name, disk = message.arguments[:2]
    return Need((MANAGE_DISKS,), {"vm": check_name(name), "disk": describe_command([disk])})


def _of_interface(message: Message) -> Need:
    *name, interface = message.arguments
    vm = check_name(name[0]) if message.vm is None else message.vm
    return Need((MANAGE_DEVICES,), {"vm": vm, "device": describe_command([interface])})


def _of_disposable(message: Message) -> Need:
    template, *_, options = message.arguments
    details = {"vm": check_name(template) if template else DEFAULT_TEMPLATE}
    if message.method == "CreateDisposable":
        return Need((CREATE_DISPOSABLE,), details)
    path, ro = options.get("path", ""), options.get("ro", False)
    if type(path) is not str or type(ro) is not bool:
        raise BadRequest("option 'path' is not of type str, or 'ro' not of type bool")
    details |= {"directory": describe_command([path]), "access": "read" if ro else "write"}
    return Need((CREATE_DISPOSABLE, SHARE_DIRECTORY), details)


_TABLE: dict[tuple[str, str], Callable[[Message], Need]] = {
    (PROPERTIES_INTERFACE, "Get"): _of_all(VIEW),
    (PROPERTIES_INTERFACE, "GetAll"): _of_all(VIEW),
    (OBJECTS_INTERFACE, "GetManagedObjects"): _of_all(VIEW),
    (MANAGER_INTERFACE, "List"): _of_all(VIEW),
    (MANAGER_INTERFACE, "Check"): _of_all(VIEW),
    (MANAGER_INTERFACE, "Reload"): _of_all(RELOAD),
    (MANAGER_INTERFACE, "Start"): _of_named(START),
    (MANAGER_INTERFACE, "Stop"): _of_named(STOP),
    (MANAGER_INTERFACE, "Kill"): _of_named(KILL),
    (MANAGER_INTERFACE, "Restart"): _of_named(STOP, START),
    (MANAGER_INTERFACE, "Run"): _of_run,
    (MANAGER_INTERFACE, "GetMemory"): _of_named(VIEW),
    (MANAGER_INTERFACE, "SetMemory"): _of_named(START),
    (MANAGER_INTERFACE, "GetNetwork"): _of_named(VIEW),
    (MANAGER_INTERFACE, "AttachInterface"): _of_interface,
    (MANAGER_INTERFACE, "DetachInterface"): _of_interface,
    (MANAGER_INTERFACE, "OpenSsh"): _of_ssh,
    (MANAGER_INTERFACE, "StartDebug"): _of_named(DEBUG),
    (MANAGER_INTERFACE, "CreateDisposable"): _of_disposable,
    (MANAGER_INTERFACE, "CreateDisposableHere"): _of_disposable,
    (MANAGER_INTERFACE, "ListPci"): _of_all(VIEW),
    (MANAGER_INTERFACE, "ClaimPci"): _of_device,
    (MANAGER_INTERFACE, "ReleasePci"): _of_device,
    (MANAGER_INTERFACE, "ListUsb"): _of_all(VIEW),
    (MANAGER_INTERFACE, "AttachUsb"): _of_usb,
    (MANAGER_INTERFACE, "DetachUsb"): _of_usb,
    (MANAGER_INTERFACE, "ReleaseUsb"): _of_usb,
    (MANAGER_INTERFACE, "ListDisks"): _of_listed,
    (MANAGER_INTERFACE, "GrowDisk"): _of_disk,
    (MANAGER_INTERFACE, "RemoveDisk"): _of_disk,
    (VM_INTERFACE, "Start"): _of_all(START),
    (VM_INTERFACE, "Stop"): _of_all(STOP),
    (VM_INTERFACE, "Kill"): _of_all(KILL),
    (VM_INTERFACE, "Restart"): _of_all(STOP, START),
    (VM_INTERFACE, "Run"): _of_run,
    (VM_INTERFACE, "GetMemory"): _of_all(VIEW),
    (VM_INTERFACE, "SetMemory"): _of_all(START),
    (VM_INTERFACE, "GetNetwork"): _of_all(VIEW),
    (VM_INTERFACE, "AttachInterface"): _of_interface,
    (VM_INTERFACE, "DetachInterface"): _of_interface,
    (VM_INTERFACE, "OpenSsh"): _of_ssh,
}
