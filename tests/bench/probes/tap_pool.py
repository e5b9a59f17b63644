"""Makes TAPs with their rules, looks again, and removes them; to be run in a network namespace of its own.

argv[1]: {"counts": [N, ...], "cpus": N}. Prints per count [seconds to make, to find nothing to do, to add
one more, to remove all].
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from pool_tools import plan_of, vm
from vmsilod.network import batch


def settle(count: int, cpus: int, lent: Path) -> float:
    plan = plan_of(*(vm(number, cpus=cpus) for number in range(1, count + 1)))
    begin = time.monotonic()
    settled = batch.settle(plan, frozenset(), lent)
    seconds = time.monotonic() - begin
    if settled.faults or settled.rules_fault:
        raise SystemExit(f"{count} TAPs: {settled.rules_fault or dict(settled.faults)}")
    return seconds


def main() -> None:
    request = json.loads(sys.argv[1])
    cpus = request["cpus"]
    with tempfile.TemporaryDirectory() as folder:
        lent = Path(folder) / "lent"
        settle(1, cpus, lent)  # what is imported and loaded once
        settle(0, cpus, lent)
        found = [
            [settle(wanted, cpus, lent) for wanted in (count, count, count + 1, 0)]
            for count in request["counts"]
        ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
