"""`make test` and `make fast`: runs the tiers in order, each as one pytest run, and says at the end what
ran.

The lab, which mostly waits for one emulated CPU, goes on beside the tiers before `host`; what it says comes
when it is through. A later tier runs also when an earlier one failed, so that one run shows everything; the
exit status is 0 only when all passed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hosts.layers import REPO, enter_private_mounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FAST = ("unit", "bus")
BESIDE_THE_LAB = (*FAST, "net")
AFTER_IT = ("host", "e2e")
NO_TESTS = 5  # pytest's exit status when a folder holds no test
Result = tuple[int, float]  # exit status, seconds


def run_tier(tier: str) -> Result:
    begin = time.monotonic()
    print(f"\n===== {tier} =====", flush=True)
    argv = [sys.executable, "-m", "pytest", "-q", "--durations=8", f"tests/{tier}"]
    status = subprocess.run(argv, cwd=REPO, stdin=subprocess.DEVNULL, check=False).returncode
    return status, time.monotonic() - begin


@contextmanager
def running_lab() -> Iterator[Callable[[], Result]]:
    """The core of the lab, whose tests run inside the machine that it boots; the call waits for its end."""
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        # It has time: its tests wait long, the others do not.
        argv = ["nice", "-n", "10", sys.executable, "-m", "hosts.lab", "--core"]
        lab = subprocess.Popen(
            argv, cwd=REPO, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT
        )

        def finish() -> Result:
            status = lab.wait()
            seconds = time.monotonic() - begin
            said.seek(0)
            print(f"\n===== lab =====\n{said.read()}", end="", flush=True)
            return status, seconds

        try:
            yield finish
        finally:
            if lab.poll() is None:
                lab.send_signal(signal.SIGTERM)
                lab.wait()


def lint() -> bool:
    print("===== lint =====", flush=True)
    commands = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",))
    return all(
        subprocess.run([sys.executable, "-m", *command], cwd=REPO, check=False).returncode == 0
        for command in commands
    )


def main() -> int:
    enter_private_mounts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    clean = lint()
    if "--fast" in sys.argv[1:]:
        results = {tier: run_tier(tier) for tier in FAST}
    else:
        with running_lab() as finish_lab:
            results = {tier: run_tier(tier) for tier in BESIDE_THE_LAB}
            results["lab"] = finish_lab()
        results |= {tier: run_tier(tier) for tier in AFTER_IT}
    print("\n===== summary =====")
    print(f"lint: {'clean' if clean else 'FAILED'}")
    for tier, (status, seconds) in results.items():
        verdict = "passed" if status == 0 else "no tests" if status == NO_TESTS else "FAILED"
        print(f"{tier}: {verdict} in {seconds:.0f} s")
    return 0 if clean and all(status == 0 for status, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
