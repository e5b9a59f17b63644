"""Images in the kernel's own huge pages: a hugetlbfs in a mount namespace of the test, a few MiB of pages. A
store that is killed at each of its steps, and the next one that gives back what the first had taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from vmsilod.hugepages import pool

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = (5 << 20) + 4096  # three huge pages
PAGES = 3
DAEMON = str(Path(__file__).parents[2] / "daemon")
# The path of the test's folder, then a command. Mounts are the process's own.
PROGRAM = '''
import json, os, signal, sys
from pathlib import Path
from vmsilod.hugepages import copying, pool
from vmsilod.hugepages.store import Store, StorePlace

folder = Path(sys.argv[1])
order = json.loads(sys.argv[2])
store = Store(StorePlace(folder / "huge", folder / "state" / "ledger"))
source = copying.Source("img", "v1", folder / "source", order.get("digest", ""))
left = order.get("steps", -1)

def step(event, arguments):
    """Every change that a process can make to files is announced to audit hooks before it is made."""
    global left
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in ("os.rename", "os.remove", "os.truncate", "mmap.__new__", "os.chmod"):
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

if left >= 0:
    sys.addaudithook(step)
result = None
try:
    for verb in order["do"]:
        if verb == "add":
            fd = store.add(source, lambda part: None)
            result = os.pread(fd, 1 << 30, 0).rstrip(b"\\0").hex()[:64]
            os.close(fd)
        elif verb == "drop":
            store.drop("img", "v1")
        elif verb == "repair":
            store.repair(set())
        elif verb == "adopt":
            store.repair({("img", "v1")})
        elif verb == "hold":
            held = store.find("img", "v1")
        elif verb == "write":
            result = os.access(folder / "huge" / "img=v1", os.W_OK)
except Exception as error:
    result = f"{type(error).__name__}: {error}"
counters = pool.read_counters()
names = sorted(path.name for path in (folder / "huge").iterdir())
print(json.dumps({"result": result, "names": names, "persistent": counters.persistent, "left": left}))
'''


class Place:
    """A folder with a source and, in the mount namespace that `keeper` keeps, a hugetlbfs."""

    def __init__(self, folder: Path, keeper: subprocess.Popen[bytes]) -> None:
        self.folder = folder
        self.keeper = keeper

    def run(self, *verbs: str, **order: Any) -> dict[str, Any] | None:
        """None: it was killed."""
        argv = ["nsenter", "-t", str(self.keeper.pid), "-m", sys.executable, "-c", PROGRAM, str(self.folder)]
        argv.append(json.dumps({"do": verbs, **order}))
        done = subprocess.run(
            argv, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": DAEMON}, check=False
        )
        if done.returncode == -9:
            return None
        assert done.returncode == 0
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    if os.geteuid() != 0:
        pytest.skip("needs root: a hugetlbfs is mounted")
    if not pool.SYSFS.is_dir():
        pytest.skip("needs a kernel with huge pages of 2 MiB")
    before = pool.read_counters()
    pool.set_persistent(before.persistent + PAGES + 1)
    made = pool.read_counters().persistent - before.persistent
    pool.set_persistent(before.persistent)
    if made < PAGES + 1:
        pytest.skip(f"needs {PAGES + 1} huge pages, and the kernel could make only {made}")
    (tmp_path / "huge").mkdir()
    (tmp_path / "source").write_bytes(os.urandom(1 << 20) * (SIZE >> 20) + b"x" * (SIZE % (1 << 20)))
    mount = f"mount -t hugetlbfs -o pagesize=2M,mode=0700 none {tmp_path}/huge && echo && exec sleep 600"
    keeper = subprocess.Popen(["unshare", "-m", "sh", "-c", mount], stdout=subprocess.PIPE)
    try:
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == b"\n"
        yield Place(tmp_path, keeper)
    finally:
        keeper.kill()
        keeper.communicate()
        now = pool.read_counters()
        pool.set_persistent(before.persistent)
    assert now.persistent == before.persistent


def digest_of(place: Place) -> str:
    return hashlib.sha256((place.folder / "source").read_bytes()).hexdigest()


def found(answer: dict[str, Any] | None) -> dict[str, Any]:
    assert answer is not None
    return answer


@pytest.mark.parametrize("with_digest", [True, False])
def test_image_is_copied_and_its_pages_are_taken_and_given_back(place: Place, with_digest: bool) -> None:  # noqa: FBT001
    before = pool.read_counters().persistent
    digest = digest_of(place) if with_digest else ""
    added = found(place.run("add", digest=digest))
    assert added["result"] == (place.folder / "source").read_bytes()[:32].hex()
    assert added["names"] == ["img=v1"]
    assert added["persistent"] == before + PAGES
    dropped = found(place.run("drop"))
    assert (dropped["names"], dropped["persistent"]) == ([], before)


def test_damaged_image_is_told_and_takes_nothing(place: Place) -> None:
    before = pool.read_counters().persistent
    answer = found(place.run("add", digest="0" * 64))
    assert "source is damaged" in answer["result"]
    assert (answer["names"], answer["persistent"]) == ([], before)


def test_short_of_pages_is_told_with_numbers_and_takes_nothing(place: Place) -> None:
    before = pool.read_counters()
    with (place.folder / "source").open("wb") as file:
        file.truncate(1 << 42)  # four TiB, of a sparse file
    answer = found(place.run("add"))
    assert f"it needs {1 << 21} of 2 MiB" in answer["result"]
    assert f"{before.available} were free, and the host has only" in answer["result"]
    assert (answer["names"], answer["persistent"]) == ([], before.persistent)


def test_image_in_use_is_adopted(place: Place) -> None:
    before = pool.read_counters().persistent
    place.run("add")
    kept = found(place.run("adopt", "hold"))
    assert (kept["names"], kept["persistent"]) == (["img=v1"], before + PAGES)
    gone = found(place.run("repair"))
    assert (gone["names"], gone["persistent"]) == ([], before)


def test_pages_of_a_dropped_image_go_when_its_last_user_goes(place: Place) -> None:
    """A VMM that still maps it keeps the pages, which the pool no longer counts as its own."""
    before = pool.read_counters()
    answer = found(place.run("add", "hold", "drop"))
    assert (answer["names"], answer["persistent"]) == ([], before.persistent)
    assert pool.read_counters().total == before.total


def test_pages_that_others_took_meanwhile_stay(place: Place) -> None:
    before = pool.read_counters().persistent
    place.run("add")
    pool.set_persistent(before + PAGES + 1)
    try:
        assert found(place.run("drop"))["persistent"] == before + 1
    finally:
        pool.set_persistent(before)


@pytest.mark.parametrize("verbs", [("add",), ("add", "drop")])
def test_killed_at_each_step(place: Place, verbs: tuple[str, ...]) -> None:
    """The next one finds what was taken, at whatever step it ended; and works."""
    before = pool.read_counters().persistent
    killed = 0
    while place.run(*verbs, steps=killed) is None:
        repaired = found(place.run("repair"))
        assert (repaired["names"], repaired["persistent"]) == ([], before), f"killed before step {killed}"
        killed += 1
    assert killed >= 8 * len(verbs), "the steps are seen"
    found(place.run("repair"))


def test_killed_while_it_repairs(place: Place) -> None:
    before = pool.read_counters().persistent
    place.run("add")
    steps = 0
    while place.run("repair", steps=steps) is None:
        steps += 1
        if steps % 2:
            continue  # the next repair meets what this one left, too
        assert found(place.run("repair"))["persistent"] == before
        place.run("add")
    assert steps >= 4
    assert found(place.run("repair"))["persistent"] == before
