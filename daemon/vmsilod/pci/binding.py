"""Carries out planned operations on sysfs and /dev/vfio, and undoes them when one fails.

`execute` is called in a worker and by vmsilo-pci-claim at boot. It decides nothing. driver_override names
one device; new_id, which would take every device of a model, is never written.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from vmsilod.errors import Failed
from vmsilod.pci.plan import Announce, AwaitGroup, GiveGroup, Override, Probe, Unbind
from vmsilod.pci.topology import VFIO_DRIVER, read_driver

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from vmsilod.pci.plan import Operation
    from vmsilod.pci.roots import Roots
    from vmsilod.pci.topology import Function

log = logging.getLogger(__name__)

GROUP_SECONDS = 10.0
UDEV_SECONDS = 2.0
POLL_SECONDS = 0.02  # the standard library hears neither udev nor inotify


class BindingFailed(Failed):
    """The kernel did not do what it was asked to; what had been done before is undone."""


def execute(operations: Sequence[Operation], roots: Roots) -> None:
    """All of them, or none: BindingFailed says which one the kernel refused."""
    with ExitStack() as undo:
        for operation in operations:
            _perform(operation, roots, undo)
        undo.pop_all()


def reset(function: Function, roots: Roots) -> str:
    """Reset an unused function; "" when that worked, else why it counts as not reset."""
    path = roots.function(function.address) / "reset"
    if not function.resets:
        path = roots.function(function.parent) / "reset_subordinate"  # since Linux 6.13
        if not function.parent or not path.exists():
            return "this kernel cannot reset it alone"
    try:
        roots.write(path, "1")
    except OSError as error:
        return f"its reset failed: {error.strerror}"
    return ""


def take_group_back(group: int, roots: Roots) -> None:
    """No uid but root's may open the group; its node may be gone with its last device."""
    node = roots.group_node(group)
    try:
        os.chown(node, 0, 0, follow_symlinks=False)
        node.chmod(0o600)
    except FileNotFoundError:
        return
    except OSError as error:
        raise BindingFailed(f"cannot take {node} back: {error.strerror}") from error


def _perform(operation: Operation, roots: Roots, undo: ExitStack) -> None:
    match operation:
        case Override():
            _override(operation, roots, undo)
        case Unbind():
            _unbind(operation, roots, undo)
        case Probe():
            _probe(operation, roots, undo)
        case Announce():
            _write(roots, roots.function(operation.address) / "uevent", "add")
        case AwaitGroup():
            _await_group(roots.group_node(operation.group), roots)
        case GiveGroup():
            undo.callback(take_group_back, operation.group, roots)
            _give_group(operation, roots)


def _override(operation: Override, roots: Roots, undo: ExitStack) -> None:
    path = roots.function(operation.address) / "driver_override"
    _write(roots, path, operation.driver)
    undo.callback(_try, lambda: roots.write(path, operation.before), f"restore {path}")


def _unbind(operation: Unbind, roots: Roots, undo: ExitStack) -> None:
    driver = roots.driver(operation.driver)
    _write(roots, driver / "unbind", operation.address)
    undo.callback(
        _try, lambda: roots.write(driver / "bind", operation.address), f"bind {operation.address} again"
    )


def _probe(operation: Probe, roots: Roots, undo: ExitStack) -> None:
    path = roots.function(operation.address)

    def unbind() -> None:
        if operation.expected and read_driver(path) == operation.expected:
            roots.write(roots.driver(operation.expected) / "unbind", operation.address)

    undo.callback(_try, unbind, f"unbind {operation.address}")
    _write(roots, roots.sys / "bus/pci/drivers_probe", operation.address)
    found = read_driver(path)
    if operation.expected and found != operation.expected:
        raise BindingFailed(
            f"{operation.expected} does not take {operation.address}"
            + (f": {found} has it" if found else ""),
            "modprobe vfio-pci" if operation.expected == VFIO_DRIVER else "",
        )


def _await_group(node: Path, roots: Roots) -> None:
    """The kernel makes the node; after that udev may give it an owner by a rule of the administrator's, and
    must not do so after us.
    """
    begin = time.monotonic()
    while not node.exists():
        if time.monotonic() > begin + GROUP_SECONDS:
            raise BindingFailed(f"{node} did not appear in {GROUP_SECONDS:.0f} s", "is udev running?")
        time.sleep(POLL_SECONDS)
    number = node.stat().st_rdev
    known = roots.udev / "data" / f"c{os.major(number)}:{os.minor(number)}"
    while roots.udev.is_dir() and not known.exists() and time.monotonic() < begin + UDEV_SECONDS:
        time.sleep(POLL_SECONDS)


def _give_group(operation: GiveGroup, roots: Roots) -> None:
    node = roots.group_node(operation.group)
    try:
        node.chmod(0o600)
        os.chown(node, operation.uid, 0, follow_symlinks=False)
    except OSError as error:
        raise BindingFailed(f"cannot give {node} away: {error.strerror}") from error


def _write(roots: Roots, path: Path, text: str) -> None:
    try:
        roots.write(path, text)
    except OSError as error:
        raise BindingFailed(f"the kernel refuses '{text}' for {path}: {error.strerror}") from error


def _try(action: Callable[[], None], what: str) -> None:
    try:
        action()
    except OSError as error:
        log.error("cannot %s: %s", what, error.strerror)
