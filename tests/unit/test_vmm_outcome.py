"""Exit codes in terms of the VM."""

from __future__ import annotations

import signal

import pytest
from vmsilod.vmm import cloud_hypervisor, crosvm, qemu
from vmsilod.vmm.choose import VmmKind
from vmsilod.vmm.drivers import DRIVERS
from vmsilod.vmm.outcome import OutcomeKind


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (0, OutcomeKind.STOPPED),
        (1, OutcomeKind.FAILED),
        (32, OutcomeKind.RESET),
        (33, OutcomeKind.CRASH),
        (34, OutcomeKind.PANIC),
        (35, OutcomeKind.BAD_ARGUMENTS),
        (36, OutcomeKind.WATCHDOG),
        (99, OutcomeKind.FAILED),
    ],
)
def test_crosvm_exit_codes(code: int, kind: OutcomeKind) -> None:
    assert crosvm.explain_exit(code, None).kind is kind


@pytest.mark.parametrize(
    ("code", "guest_ran", "kind"),
    [
        (0, True, OutcomeKind.STOPPED),
        (1, False, OutcomeKind.FAILED),
        (1, True, OutcomeKind.PANIC),
        (3, True, OutcomeKind.FAILED),
    ],
)
def test_qemu_exit_codes(code: int, guest_ran: bool, kind: OutcomeKind) -> None:  # noqa: FBT001
    assert qemu.explain_exit(code, None, guest_ran=guest_ran).kind is kind


@pytest.mark.parametrize(
    ("code", "guest_ran", "kind"),
    [
        (0, True, OutcomeKind.STOPPED),
        (1, False, OutcomeKind.FAILED),
        (1, True, OutcomeKind.CRASH),
        (2, False, OutcomeKind.BAD_ARGUMENTS),
        (101, True, OutcomeKind.CRASH),
        (7, True, OutcomeKind.FAILED),
    ],
)
def test_cloud_hypervisor_exit_codes(code: int, guest_ran: bool, kind: OutcomeKind) -> None:  # noqa: FBT001
    assert cloud_hypervisor.explain_exit(code, None, guest_ran=guest_ran).kind is kind


@pytest.mark.parametrize("vmm", VmmKind)
@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (signal.SIGKILL, OutcomeKind.KILLED, "SIGKILL"),
        (signal.SIGTERM, OutcomeKind.KILLED, "SIGTERM"),
        (signal.SIGABRT, OutcomeKind.CRASH, "SIGABRT"),
        (signal.SIGSYS, OutcomeKind.CRASH, "sandbox forbids"),
        (signal.SIGSEGV, OutcomeKind.CRASH, "SIGSEGV"),
        (40, OutcomeKind.CRASH, "signal 40"),
    ],
)
def test_signals(vmm: VmmKind, number: int, kind: OutcomeKind, text: str) -> None:
    outcome = DRIVERS[vmm].explain_exit(None, number)
    assert outcome.kind is kind
    assert text in outcome.message
