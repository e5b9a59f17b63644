"""vmsilod killed at each step of a batch: nothing is open without its rules, and the next one goes on."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from main_loop import run
from pool_tools import applied, bridged, ip, nft, plan_of, pool_at, require_workers_here, taps_there, vm
from vmsilod.network import batch

if TYPE_CHECKING:
    from types import FrameType

    from vmsilod.config.model import VmConfig

# Each call of these changes the kernel or a file, or is about to.
STEPS = {
    *("create_tap", "make_persistent", "mark", "set_state", "join_bridge", "isolate", "add_address"),
    *("remove_address", "delete", "ensure_rules", "remove_rules", "lend_forwarding", "forward", "_save"),
}
FOREIGN = {"br0", "wan0", "wan1"}

BEFORE = (vm(1), vm(2, cpus=2), bridged(3, "br0"))
AFTER = (vm(1, addresses=[], tap={"host_address": "10.7.7.1/24"}), vm(2), bridged(3, "br0"), vm(4))


@pytest.fixture(autouse=True)
def foreign_devices() -> None:
    require_workers_here()
    ip("link", "add", "br0", "type", "bridge")
    ip("link", "add", "wan0", "type", "veth", "peer", "name", "wan1")


def die_at(step: int, vms: tuple[VmConfig, ...], lent: Path) -> bool:
    """Settle in a process that is killed at that step; False when there are not so many."""
    child = os.fork()
    if child == 0:
        left = step

        def count(frame: FrameType, event: str, _argument: Any) -> None:
            nonlocal left
            known = frame.f_globals.get("__name__", "").startswith("vmsilod.network.")
            if event in ("call", "return") and known and frame.f_code.co_name in STEPS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        try:
            batch.settle(plan_of(*vms, nat="wan0" if vms else ""), frozenset(), lent)
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status)


def snapshot(lent: Path) -> tuple[object, ...]:
    """All that the batch makes, without what numbers itself."""
    links = []
    for name in sorted(taps_there()):
        shown = ip("-d", "addr", "show", name)
        words = shown.replace(f"{shown.split(':', 1)[0]}:", "", 1)
        forwarding = Path(f"/proc/sys/net/ipv4/conf/{name}/forwarding").read_text()
        keep = [word for word in words.splitlines() if "valid_lft" not in word and "inet6 fe80" not in word]
        links.append(
            (name, forwarding, *((line,) for line in keep if "bridge_" not in line and name not in FOREIGN))
        )
    return (*links, nft("list", "ruleset"), lent.exists())


def check_closed() -> None:
    """Whatever is up, has its rules."""
    rules = nft("list", "ruleset")
    for name in taps_there() - FOREIGN:
        if ",UP" in ip("link", "show", name).split(">")[0]:
            assert re.search(rf"\b{name}\b", rules), name


@pytest.mark.parametrize(("before", "after"), [((), BEFORE), (BEFORE, AFTER), (BEFORE, ())])
def test_a_batch_that_dies_is_finished_by_the_next(
    before: tuple[VmConfig, ...], after: tuple[VmConfig, ...], tmp_path: Path
) -> None:
    lent = tmp_path / "lent"
    applied(pool_at(lent), *before, nat="wan0" if before else "")
    applied(pool_at(lent), *after, nat="wan0" if after else "")
    wanted = snapshot(lent)
    step = 0
    died = True
    while died:
        applied(pool_at(lent))
        assert taps_there() == FOREIGN
        applied(pool_at(lent), *before, nat="wan0" if before else "")
        died = die_at(step, after, lent)
        check_closed()
        applied(pool_at(lent), *after, nat="wan0" if after else "")
        assert snapshot(lent) == wanted, f"killed at step {step}"
        step += 1
    assert step > 5
    applied(pool_at(lent))
    assert taps_there() == FOREIGN
    assert nft("list", "ruleset") == ""
    assert Path("/proc/sys/net/ipv4/conf/wan0/forwarding").read_text() == "0\n"


def test_a_vm_that_runs_keeps_its_tap_through_a_crash(tmp_path: Path) -> None:
    lent = tmp_path / "lent"
    pool = pool_at(lent)
    applied(pool, *BEFORE)
    (opened,) = run(pool.open("vm1"))
    index = Path("/sys/class/net/vm1-0/ifindex").read_text()
    for step in (0, 5, 10, 15, 20):
        die_at(step, BEFORE, lent)
        again = pool_at(lent)
        run(again.repair({"vm1": BEFORE[0]}))
        applied(again, *AFTER)
        assert Path("/sys/class/net/vm1-0/ifindex").read_text() == index
        assert "LOWER_UP" in ip("link", "show", "vm1-0")
        assert "10.0.1.1/24" in ip("addr", "show", "vm1-0")
    for fd in opened.tap_fds:
        os.close(fd)
