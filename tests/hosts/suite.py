"""`make test` and `make fast`: runs the tiers in order, each as one pytest run, and says at the end what
ran.

A later tier runs also when an earlier one failed, so that one run shows everything; the exit status is 0
only when all passed.
"""

from __future__ import annotations

import subprocess
import sys
import time

from hosts.lab_machine import find_accelerator
from hosts.layers import REPO, enter_private_mounts

FAST = ("unit", "bus")
ALL = (*FAST, "net", "host", "e2e", "lab")
NO_TESTS = 5  # pytest's exit status when a folder holds no test


def run_tier(tier: str) -> tuple[int, float]:
    begin = time.monotonic()
    print(f"\n===== {tier} =====", flush=True)
    argv = [sys.executable, "-m", "pytest", "-q", f"tests/{tier}"]
    if tier == "lab":  # its tests run inside the machine that this boots
        argv = [sys.executable, "-m", "hosts.lab", "--core"]
    status = subprocess.run(argv, cwd=REPO, stdin=subprocess.DEVNULL, check=False).returncode
    return status, time.monotonic() - begin


def find_tiers() -> tuple[str, ...]:
    """The lab's core only with nested KVM: under QEMU's emulation of SVM its guests hang now and then (a
    vCPU that faults for ever on one instruction), and its own kernel crashes; that says nothing of vmsilo.
    """
    if find_accelerator() == "kvm":
        return ALL
    print("skipped: lab, which needs nested KVM to be reliable; `make lab-test` runs it all the same")
    return ALL[:-1]


def lint() -> bool:
    print("===== lint =====", flush=True)
    commands = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",))
    return all(
        subprocess.run([sys.executable, "-m", *command], cwd=REPO, check=False).returncode == 0
        for command in commands
    )


def main() -> int:
    tiers = FAST if "--fast" in sys.argv[1:] else find_tiers()
    enter_private_mounts()
    clean = lint()
    results = {tier: run_tier(tier) for tier in tiers}
    print("\n===== summary =====")
    print(f"lint: {'clean' if clean else 'FAILED'}")
    for tier, (status, seconds) in results.items():
        verdict = "passed" if status == 0 else "no tests" if status == NO_TESTS else "FAILED"
        print(f"{tier}: {verdict} in {seconds:.0f} s")
    return 0 if clean and all(status == 0 for status, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
