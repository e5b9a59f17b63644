"""Landlock for virtiofsd: it writes below the shared directory and nowhere else, and reads what it needs to
run.

Called by `serve` right before virtiofsd is executed. virtiofsd without a sandbox of its own takes names with
".." from the guest (1.13.2: in mkdir, unlink, rename), and by looking up ".." a guest comes to what is above
the directory. The unit's file system holds that; this keeps a guest from /proc/self/mem there, by which it
would become virtiofsd. Where the kernel has no Landlock, or one that would forbid renames, nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

# linux/landlock.h; syscall numbers are the same on all architectures.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
GET_VERSION = 1
PATH_BENEATH = 1
RENAMES_SINCE = 2  # ABI; before that every rename between directories is refused
EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
EVERYTHING = (1 << 14) - 1  # of ABI 2
READ = EXECUTE | READ_FILE | READ_DIR


def confine(program: str, writable: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), GET_VERSION) < RENAMES_SINCE:
        return
    handled = ctypes.c_uint64(EVERYTHING)
    ruleset = libc.syscall(CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    try:
        _allow(libc, ruleset, writable, EVERYTHING)
        for path in ("/lib", "/lib64"):
            with contextlib.suppress(FileNotFoundError):
                _allow(libc, ruleset, path, READ)
        for path in (program, "/etc/ld.so.cache", "/proc/sys/fs/nr_open"):
            with contextlib.suppress(FileNotFoundError):
                _allow(libc, ruleset, path, EXECUTE | READ_FILE)
        if libc.syscall(RESTRICT_SELF, ruleset, 0) < 0:
            raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, access: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        # struct landlock_path_beneath_attr is packed: 64 bits of access, 32 of the descriptor.
        rule = ctypes.create_string_buffer(access.to_bytes(8, "little") + fd.to_bytes(4, "little"), 12)
        if libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, ctypes.byref(rule), 0) < 0:
            raise OSError(ctypes.get_errno(), "landlock_add_rule")
    finally:
        os.close(fd)
