"""Fork into a cgroup.

Moving a running process to another cgroup waits for an RCU grace period in the kernel, 10 to 20 ms, on
the path of every command.  clone3(CLONE_INTO_CGROUP) does not, but Python has no binding for it.  The raw
call is safe here because the agent has one thread: no lock of libc or of the interpreter can be held by
another one, and the child only prepares an exec.
"""

import ctypes
import os
import signal
import struct

from vmsilo_agent.cgroup import CommandGroup

_SYS_CLONE3 = 435  # the same on every architecture
_CLONE_INTO_CGROUP = 0x2_0000_0000
# clone_args: flags pidfd child_tid parent_tid exit_signal stack stack_size tls set_tid set_tid_size cgroup
_CLONE_ARGS = struct.Struct("=11Q")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def fork_into(group: CommandGroup | None) -> int:
    """As os.fork; the child starts in `group`.  OSError where neither way of getting there works."""
    if group is None:
        return os.fork()
    directory = group.open_directory()
    try:
        args = _CLONE_ARGS.pack(_CLONE_INTO_CGROUP, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, directory)
        pid: int = _libc.syscall(ctypes.c_long(_SYS_CLONE3), args, ctypes.c_size_t(len(args)))
    finally:
        os.close(directory)
    if pid >= 0:
        return pid
    pid = os.fork()
    if pid == 0:
        try:
            (group.path / "cgroup.procs").write_bytes(b"0")
        except OSError:
            os._exit(126)  # outside of its cgroup it could not be killed
    return pid
