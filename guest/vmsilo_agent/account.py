"""Who a command runs as.  Read from the guest's user database for each command, by name."""

import os
import pwd


class Account:
    """Never changed after construction."""

    __slots__ = ("gid", "groups", "home", "name", "shell", "uid")

    def __init__(self, entry: pwd.struct_passwd, groups: list[int]) -> None:
        self.name = entry.pw_name
        self.uid = entry.pw_uid
        self.gid = entry.pw_gid
        self.home = entry.pw_dir or "/"
        self.shell = entry.pw_shell or "/bin/sh"
        self.groups = groups

    @property
    def runtime_dir(self) -> str:
        return f"/run/user/{self.uid}"


def find_account(name: str) -> Account | None:
    try:
        entry = pwd.getpwnam(name)
        return Account(entry, os.getgrouplist(name, entry.pw_gid))
    except KeyError:
        return None
