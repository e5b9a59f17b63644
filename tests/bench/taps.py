"""Section `taps`: how long it takes until the TAPs of 1, 100 and 500 VMs are there with addresses and rules.

In a network namespace of this machine, with its own nft; nothing of the container host is in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.report import Row, in_ms, print_section

COUNTS = (1, 100, 500)
MOST_SECONDS = 300
PROBE = Path(__file__).parent / "probes/tap_pool.py"


def measure() -> None:
    rows = []
    for cpus, counts in ((1, COUNTS), (2, COUNTS[:2])):
        kind = "one queue each" if cpus == 1 else f"{cpus} queues each"
        for count, times in zip(counts, run_probe(counts, cpus), strict=True):
            made, nothing, one_more, removed = (in_ms(seconds) for seconds in times)
            what = f"{count} TAP{'s' if count > 1 else ''} with rules, {kind}"
            others = f"nothing to do {nothing}, one more {one_more}, all removed {removed}"
            rows.append(Row(what, made, compared=others))
    print_section("TAPs of many VMs: made in one batch, with addresses and rules", rows)


def run_probe(counts: tuple[int, ...], cpus: int) -> list[list[float]]:
    request = json.dumps({"counts": counts, "cpus": cpus})
    # /sys shows the namespace of whoever mounted it.
    script = 'mount -t sysfs sysfs /sys && exec "$@"'
    argv = ["unshare", "-n", "-m", "sh", "-c", script, "sh", sys.executable, str(PROBE), request]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=MOST_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{PROBE.name}: {done.stderr.strip()[-500:]}")
    found: list[list[float]] = json.loads(done.stdout)
    return found
