"""One cgroup per command, so that everything it left behind can be found and killed.

`find_tree` takes over the unit's delegated cgroup v2 at start: the agent itself moves to `agent/`, because a
cgroup with processes may have no children with controllers.  Commands get `cmd-N/`, which only root can
write, so a command cannot leave it.  Without cgroup v2 or delegation there is no tree, and commands are
killed by process group.
"""

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

from vmsilo_agent.loop import PRIORITY, Loop, log

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class CommandGroup:
    """The cgroup of one command; exists until `remove_when_empty` has seen it empty."""

    def __init__(self, loop: Loop, path: Path) -> None:
        self._loop = loop
        self._events = -1
        self._on_empty: Callable[[], None] | None = None
        self.path = path
        path.mkdir()

    def open_directory(self) -> int:
        """A descriptor for clone3(CLONE_INTO_CGROUP); the caller closes it."""
        return os.open(self.path, _DIRECTORY)

    def signal(self, number: int) -> None:
        for directory, _, _ in os.walk(self.path):
            for pid in _read_pids(Path(directory)):
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass
                except OSError as exc:
                    log(f"cannot signal {pid}, ignoring: {exc.strerror}")

    def kill(self) -> None:
        try:
            (self.path / "cgroup.kill").write_bytes(b"1")
        except FileNotFoundError:  # before Linux 5.14, or already removed
            self.signal(signal.SIGKILL)
        except OSError as exc:
            log(f"cannot kill {self.path.name}: {exc.strerror}")
            self.signal(signal.SIGKILL)

    def remove_when_empty(self, on_empty: Callable[[], None] | None = None) -> None:
        """Removes the directory now or as soon as its last process is gone; then calls `on_empty`."""
        self._on_empty = on_empty
        if self._events == -1 and not self._remove():
            try:
                self._events = os.open(self.path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as exc:
                log(f"cannot watch {self.path.name}, ignoring: {exc.strerror}")
                return
            self._loop.watch(self._events, PRIORITY, self._changed)
            self._changed(0)  # it may have become empty before the watch

    def _changed(self, _mask: int) -> None:
        # Reading re-arms the notification: kernfs reports a change until the file is read again.
        if b"populated 0" in os.pread(self._events, 256, 0):
            self._remove()

    def _remove(self) -> bool:
        try:
            for directory, _, _ in os.walk(self.path, topdown=False):
                Path(directory).rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            return False  # still populated
        if self._events != -1:
            self._loop.forget(self._events)
            os.close(self._events)
            self._events = -1
        on_empty, self._on_empty = self._on_empty, None
        if on_empty is not None:
            on_empty()
        return True


class CgroupTree:
    """The agent's delegated cgroup.  Lives as long as the agent."""

    def __init__(self, loop: Loop, root: Path) -> None:
        self._loop = loop
        self._root = root
        self._numbers = itertools.count(1)

    def create(self) -> CommandGroup:
        """OSError where the kernel refuses."""
        return CommandGroup(self._loop, self._root / f"cmd-{next(self._numbers)}")


def find_tree(loop: Loop) -> CgroupTree | None:
    """Moves the agent into its own subgroup; None where there is nothing delegated to it."""
    try:
        root = _find_own_cgroup()
        if root is None:
            return None
        for leftover in root.glob("cmd-*"):  # of an agent that died; systemd killed what was in them
            leftover.rmdir()
        own = root / "agent"
        own.mkdir(exist_ok=True)
        (own / "cgroup.procs").write_bytes(b"0")
    except OSError as exc:
        log(f"no delegated cgroup, commands are killed by process group: {exc}")
        return None
    return CgroupTree(loop, root)


def _find_own_cgroup() -> Path | None:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    if own == "/":  # the root of the hierarchy belongs to the system, not to a unit
        return None
    if own.endswith("/agent"):  # restarted in place
        own = own.removesuffix("/agent")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        fields = mount.split(" ")
        if kind.startswith("cgroup2 ") and fields[3] == "/":
            return Path(fields[4] + own)
    return None


def _read_pids(directory: Path) -> list[int]:
    try:
        return [int(line) for line in (directory / "cgroup.procs").read_text().split()]
    except OSError:
        return []  # removed meanwhile
