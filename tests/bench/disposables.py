"""Section 8: a disposable from the command to its first byte, and from the command's end to the prompt,
beside a cold start of its template; and what making one costs before its VMM starts.

In turn, so that both see the same machine. The boot is the same; what is looked for is what is added to it.
"""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING, NamedTuple

from hosts import layers

from bench.ground import VM
from bench.report import Row, as_difference, as_ratio, in_ms, median, print_section

if TYPE_CHECKING:
    from bench.ground import Ground

PAIRS = 4
MAKES = 20
AIM_SECONDS = 0.250  # that a disposable may add to the first byte
PROMPT_SECONDS = 0.100
MANAGER = ("org.vmsilo1", "/org/vmsilo1", "org.vmsilo1.Manager")


class Times(NamedTuple):
    """Seconds: from the command to its first byte, and from its end to the prompt."""

    first: float
    prompt: float


def measure(ground: Ground) -> None:
    cold, fresh = [], []
    for _ in range(PAIRS):
        ground.host.run(["vm-stop", VM], user=layers.USER)
        cold.append(run_once(ground, VM))
        ground.host.run(["vm-stop", VM], user=layers.USER)
        fresh.append(run_once(ground, "--disposable", VM))
        ground.host.wait_until(f"! ls /run/vmsilo | grep -q '^{VM}-d'")
    make, empty = time_makes(ground)
    print_section(
        f"8. Disposables ({PAIRS} pairs, in turn; medians)",
        rows(cold, fresh, make, empty),
        [
            "first byte, disposable: " + " ".join(f"{each.first:.2f}" for each in fresh) + " s",
            "first byte, cold VM: " + " ".join(f"{each.first:.2f}" for each in cold) + " s",
        ],
    )


def rows(cold: list[Times], fresh: list[Times], make: float, empty: float) -> list[Row]:
    first, floor = median([each.first for each in fresh]), median([each.first for each in cold])
    prompt, floor_prompt = median([each.prompt for each in fresh]), median([each.prompt for each in cold])
    return [
        Row(
            f"`vm-run --disposable {VM}` to the first byte; floor: cold `vm-run {VM}`",
            f"{first:.2f} s",
            f"{floor:.2f} s",
            f"{as_ratio(first, floor)}, {as_difference(first - floor)}",
            f"+{AIM_SECONDS * 1000:.0f} ms",
            first - floor <= AIM_SECONDS,
        ),
        Row(
            "the command's end to the prompt, clean-up going on",
            in_ms(prompt),
            in_ms(floor_prompt),
            as_difference(prompt - floor_prompt),
            f"{PROMPT_SECONDS * 1000:.0f} ms",
            prompt <= PROMPT_SECONDS,
        ),
        Row(
            f"CreateDisposable, by busctl ({MAKES} times); floor: List",
            in_ms(make),
            in_ms(empty),
            as_difference(make - empty),
        ),
    ]


def run_once(ground: Ground, *where: str) -> Times:
    """The command says a byte, and its end is when its output is closed."""
    argv = ground.host.argv(["vm-run", *where, "sh", "-c", "echo; exec sleep 0.5"], user=layers.USER)
    begin = time.monotonic()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        client.stdout.readline()
        first = time.monotonic()
        status = client.wait(60)
        end = time.monotonic()
    if status:
        raise RuntimeError(f"vm-run {' '.join(where)} exited with {status}")
    return Times(first - begin, max(0.0, end - first - 0.5))


def time_makes(ground: Ground) -> tuple[float, float]:
    """Medians. busctl lets go of its connection at once, and with it of the disposable."""
    make: list[float] = []
    empty: list[float] = []
    for _ in range(MAKES):
        for times, call in ((make, ("CreateDisposable", "sa{sv}", VM, "0")), (empty, ("List",))):
            begin = time.monotonic()
            ground.host.run(["busctl", "call", *MANAGER, *call], user=layers.USER)
            times.append(time.monotonic() - begin)
        ground.host.wait_until(f"! ls /run/vmsilo | grep -q '^{VM}-d'")
    return median(make), median(empty)
