"""Sockets of vhost-user backends: connected to, or judged by their mode, for a VMM of another uid."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from vmsilod.errors import StartFailed
from vmsilod.resources.vhost_user import (
    Account,
    connect_socket,
    find_groups,
    may_access,
    open_socket,
    require_disk_access,
    require_socket_access,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give files away")
STRANGER = Account(uid=61234, groups=frozenset({61234, 105}))


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "backend.sock"))
        listener.listen()
        yield listener


def path_of(listener: socket.socket) -> Path:
    return Path(listener.getsockname())


def test_connection_is_to_that_backend(backend: socket.socket) -> None:
    with socket.socket(fileno=connect_socket(path_of(backend))) as ours:
        theirs, _ = backend.accept()
        with theirs:
            theirs.sendall(b"hello")
        assert ours.recv(10) == b"hello"
        assert ours.gettimeout() is None
        assert not os.get_inheritable(ours.fileno())


def test_backend_that_is_gone(backend: socket.socket) -> None:
    path = path_of(backend)
    backend.close()
    with pytest.raises(StartFailed, match="no vhost-user backend listens") as caught:
        connect_socket(path)
    assert "before the VM" in caught.value.hint


def test_path_that_is_not_there_or_no_socket(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match="No such file"):
        connect_socket(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(StartFailed, match="is not a socket"):
        connect_socket(tmp_path / "file")


def test_no_descriptor_is_left(backend: socket.socket, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a Path would open a descriptor of its own
    for path in (tmp_path / "file", tmp_path / "nothing"):
        with pytest.raises(StartFailed):
            connect_socket(path)
    os.close(connect_socket(path_of(backend)))
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - as above


@as_root
@pytest.mark.parametrize(
    ("mode", "uid", "gid", "allowed"),
    [
        (0o600, 0, 0, False),
        (0o660, 0, 105, True),
        (0o606, 0, 105, False),  # of the group, so what others may does not matter
        (0o666, 0, 0, True),
        (0o200, 61234, 0, True),
        (0o066, 61234, 0, False),
    ],
)
def test_right_to_connect_is_as_the_kernel_has_it(
    backend: socket.socket, mode: int, uid: int, gid: int, *, allowed: bool
) -> None:
    path = path_of(backend)
    os.chown(path, uid, gid)
    path.chmod(mode)
    fd = open_socket(path)
    try:
        assert may_access(fd, STRANGER, 2) is allowed
        if allowed:
            require_socket_access(path, fd, STRANGER)
        else:
            with pytest.raises(StartFailed, match="may not connect"):
                require_socket_access(path, fd, STRANGER)
    finally:
        os.close(fd)


@as_root
def test_inode_alone_is_enough_to_connect_to(backend: socket.socket) -> None:
    """What a VMM does with the descriptor: no directory on the way is entered."""
    path = path_of(backend)
    path.chmod(0o666)
    path.parent.chmod(0o700)
    fd = open_socket(path)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setresuid(61234, 61234, 61234)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(f"/proc/self/fd/{fd}")
            status = 0
        finally:
            os._exit(status)
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize(
    ("mode", "writable", "allowed"),
    [(0o600, False, False), (0o644, False, True), (0o644, True, False), (0o666, True, True)],
)
def test_disk_that_the_vmm_opens_itself(tmp_path: Path, mode: int, *, writable: bool, allowed: bool) -> None:
    path = tmp_path / "disk"
    path.touch()
    path.chmod(mode)
    fd = os.open(path, os.O_RDWR)
    try:
        if allowed:
            require_disk_access(path, fd, STRANGER, writable=writable)
        else:
            with pytest.raises(StartFailed, match="may not") as caught:
                require_disk_access(path, fd, STRANGER, writable=writable)
            assert "crosvm" in caught.value.hint
    finally:
        os.close(fd)


def test_groups_are_those_of_the_process() -> None:
    assert find_groups(os.getpid(), 4711) == {4711, *os.getgroups()}
