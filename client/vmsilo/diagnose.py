"""Why a command socket gave no connection: asks vmsilod.

Only on the way to an error message, never on the warm path.
"""

from vmsilo.bus import NOT_RUNNING_HINT, Bus, describe_end, unknown_vm
from vmsilo.errors import ClientError, SocketClosedError, StoppedMeanwhileError, printable
from vmsilo.names import list_names
from vmsilo.place import Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

UP = ("running", "stopping", "starting")
LOSS_WAIT = 2.0  # seconds for vmsilod to find out that the VM has ended


def explain(name: str, place: Place, closed: SocketClosedError, began: float) -> ClientError | None:
    """The error to show; None if the VM only stopped meanwhile, so that a second try starts it again.
    `began`: when we asked for it, on the monotonic clock. A start that was under way then or since, and that
    somebody has ended, is not begun again.
    """
    try:
        bus = Bus(place)
        try:
            vms = bus.find_vms()
        finally:
            bus.close()
    except ClientError as failed:
        known = list_names(place)
        if known and name not in known:
            return unknown_vm(name, known, place)
        return ClientError(f"{closed.fact}; {failed.fact}", failed.hint or NOT_RUNNING_HINT)
    for vm in vms:
        if vm.get("Name") == name:
            return _explain_vm(name, place, vm, closed, began)
    return unknown_vm(name, [str(vm.get("Name", "")) for vm in vms], place)


def _explain_vm(
    name: str, place: Place, vm: "dict[str, Any]", closed: SocketClosedError, began: float
) -> ClientError | None:
    state = vm.get("State")
    if state == "broken":
        return ClientError(f"VM '{name}' has a broken configuration: {describe_end(vm)}", "vmsilo check")
    if state == "failed":
        return ClientError(
            f"VM '{name}' failed to start: {describe_end(vm)}", f"journalctl -b -u vmsilo-{name}-vm"
        )
    if state in ("stopped", "stopping"):
        # What was told of it by the relay needs no guess.
        if isinstance(closed, StoppedMeanwhileError) or vm.get("StartOverMonotonic", 0) < began * 1e6:
            return None
        return ClientError(f"VM '{name}' was stopped while it started", f"vmsilo status {name}")
    ended = explain_loss(name, place, closed)
    if ended is not closed:
        return ended
    return ClientError(closed.fact, f"systemctl status vmsilo-relayd vmsilo-{name}-vm")


def explain_loss(name: str, place: Place, lost: ClientError) -> ClientError:
    """Why a command's connection ended under it: the VM's end, if that is what happened within LOSS_WAIT."""
    import select
    import time

    deadline = time.monotonic() + LOSS_WAIT
    try:
        bus = Bus(place)
        try:
            bus.watch_states()
            vm = bus.find_vm(name) or {}
            while vm.get("State") in UP and (left := deadline - time.monotonic()) > 0:
                if select.select([bus], [], [], left)[0] and any(n == name for n, _, _ in bus.read_states()):
                    vm = bus.find_vm(name) or {}
        finally:
            bus.close()
    except ClientError:
        return lost  # the fact alone is true, too
    if vm.get("State") == "starting" and not isinstance(lost, SocketClosedError):
        return ClientError(f"{lost.fact}: the VM is starting again", f"vmsilo status {name}")
    if vm.get("State") not in ("stopped", "failed", "broken"):
        return lost
    reason = printable(vm.get("LastResult") or "")
    if not reason and isinstance(lost, SocketClosedError):
        return lost  # it says so already
    reason = reason or "the VM has stopped"
    return ClientError(f"{lost.fact}: {reason}", f"vmsilo status {name}")


def check_running(name: str, place: Place) -> None:
    """Raises ClientError unless the VM runs, or is about to. Starts nothing."""
    bus = Bus(place)
    try:
        vms = bus.find_vms()
    finally:
        bus.close()
    for vm in vms:
        if vm.get("Name") == name:
            if vm.get("State") not in ("running", "starting"):
                raise ClientError(f"VM '{name}' is not running", f"vm-start {name}")
            return
    raise unknown_vm(name, [str(vm.get("Name", "")) for vm in vms], place)
