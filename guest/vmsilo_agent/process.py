"""One command's processes: start, exit status, signals, and the end of everything it started.

Created by a connection, and may outlive it: after a detached start, or while what a vanished client left is
given time to end.  Never touches the command's data; `streams` does.
"""

import os
import select
import signal
from collections.abc import Callable

from vmsilo_wire.payload import Spawn

from vmsilo_agent.account import Account
from vmsilo_agent.cgroup import CgroupTree, CommandGroup
from vmsilo_agent.child import Stdio, become_command
from vmsilo_agent.forking import fork_into
from vmsilo_agent.loop import READ, Loop, Timer, log

KILL_GRACE = 3.0  # seconds between HUP and KILL


class Watcher:
    """Whom a process tells: first either `started` or `failed`; `exited` after either."""

    __slots__ = ("exited", "failed", "started")

    def __init__(
        self,
        *,
        started: Callable[[], None],
        failed: Callable[[str, str], None],
        exited: Callable[[int], None],
    ) -> None:
        self.started = started
        self.failed = failed
        self.exited = exited


class Process:
    """From fork until the main process is reaped and its cgroup removed.

    The main process stays a zombie until `release` or `terminate` is done with it, so that its number, which
    is also its process group's, cannot become another process's while it may be signalled.
    """

    def __init__(self, loop: Loop, pid: int, group: CommandGroup | None, status_fd: int) -> None:
        self._loop = loop
        self._group = group
        self._status_fd = status_fd
        self._watcher: Watcher | None = None
        self._hold_zombie = True
        self._kill_timer: Timer | None = None
        self.pid = pid
        self.status: int | None = None
        self._reaped = False
        self._pidfd = os.pidfd_open(pid)

    def watch(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._loop.watch(self._status_fd, READ, self._status_ready)

    def signal(self, number: int) -> None:
        """To the process group, for as long as the main process runs."""
        if self.status is None:
            # The group is an orphaned one (its parent, the agent, is in another session), for which the
            # kernel discards the stop that TSTP stands for.
            self._signal_process_group(signal.SIGSTOP if number == signal.SIGTSTP else number)

    def release(self) -> None:
        """The main process is not needed any more; what it left in the background runs on."""
        self._watcher = None
        self._hold_zombie = False
        if self.status is not None:
            self._reap()

    def terminate(self) -> None:
        """HUP to everything the command started, and KILL after a grace period."""
        self._watcher = None
        if self._group is None:
            self._signal_process_group(signal.SIGHUP)
            self._signal_process_group(signal.SIGCONT)
            self._kill_timer = self._loop.call_later(KILL_GRACE, self._kill)
            return
        self._hold_zombie = False
        self._group.signal(signal.SIGHUP)
        self._group.signal(signal.SIGCONT)
        self._kill_timer = self._loop.call_later(KILL_GRACE, self._kill)
        if self.status is not None:
            self._reap()
        else:
            self._group.remove_when_empty(self._kill_timer.cancel)

    def _kill(self) -> None:
        if self._group is not None:
            self._group.kill()
            return
        self._signal_process_group(signal.SIGKILL)
        self.release()

    def _signal_process_group(self, number: int) -> None:
        if self._reaped:
            return
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # forked, but not yet the leader of its group
            os.kill(self.pid, number)
        except OSError as exc:
            log(f"cannot signal process group {self.pid}, ignoring: {exc.strerror}")

    def _status_ready(self, _mask: int) -> None:
        """End of file: exec succeeded (or the child was killed, which the exit tells).  Text: it failed."""
        text = os.read(self._status_fd, 4096)
        self._loop.forget(self._status_fd)
        os.close(self._status_fd)
        self._status_fd = -1
        self._loop.watch(self._pidfd, READ, self._exited)
        if self._watcher is None:
            return
        if text:
            code, _, message = text.decode("utf-8", "surrogateescape").partition("\n")
            self._watcher.failed(code, message)
        else:
            self._watcher.started()

    def _exited(self, _mask: int) -> None:
        result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if result is None:
            return
        self._loop.forget(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self.status = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        if self._watcher is not None:
            self._watcher.exited(self.status)
        if not self._hold_zombie:
            self._reap()

    def _reap(self) -> None:
        if self._reaped:
            return
        self._reaped = True
        os.waitpid(self.pid, 0)
        if self._group is not None:
            self._group.remove_when_empty(self._kill_timer.cancel if self._kill_timer else None)


def start_process(
    loop: Loop,
    tree: CgroupTree | None,
    spawn: Spawn,
    account: Account,
    stdio: Stdio,
    nofile: tuple[int, int],
) -> Process:
    """OSError where there is no room for another process.  The caller closes its copies of `stdio`."""
    group = None if tree is None else tree.create()
    try:
        status_read, status_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            pid = fork_into(group)
            if pid == 0:
                become_command(spawn, account, stdio, status_write, nofile)
        except BaseException:
            os.close(status_read)
            raise
        finally:
            os.close(status_write)
    except BaseException:
        if group is not None:
            group.remove_when_empty()
        raise
    try:
        return Process(loop, pid, group, status_read)
    except OSError:  # no descriptor left for the pidfd
        os.close(status_read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if group is not None:
            group.remove_when_empty()
        raise


def run_quietly(argv: tuple[str, ...], loop: Loop, done: Callable[[int, bytes], None]) -> None:
    """Runs a program of the guest's without waiting; `done` gets its status and up to 64 KiB of output.

    OSError where it cannot be started.
    """
    output_read, output_write = os.pipe2(os.O_CLOEXEC)
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            actions = [
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, output_write, 1),
                (os.POSIX_SPAWN_DUP2, null, 2),
            ]
            env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "SYSTEMD_PAGER": ""}
            pid = os.posix_spawnp(argv[0], argv, env, file_actions=actions, setsigdef=[signal.SIGPIPE])
        finally:
            os.close(null)
            os.close(output_write)
    except OSError:
        os.close(output_read)
        raise
    pidfd = os.pidfd_open(pid)

    def exited(_mask: int) -> None:
        loop.forget(pidfd)
        os.close(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.set_blocking(output_read, False)
        try:
            output = os.read(output_read, 64 * 1024)
        except BlockingIOError:
            output = b""
        os.close(output_read)
        done(status, output)

    loop.watch(pidfd, select.EPOLLIN, exited)
