"""Acquires what one VM start needs, as one scoped step that runs in the worker.

Called by the lifecycle. Everything acquired is on an ExitStack until the whole succeeded, so a failure
half-way gives back what was taken. It sees no state and talks to no bus.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inotify_simple import INotify, flags

from vmsilod.errors import StartFailed
from vmsilod.resources import disks, image, image_check, record, rundir, ssh_keys, vhost_user, vsock

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmsilod.resources.vhost_user import Account

SECRET_BYTES = 32
HYBRID_READY_SECONDS = 10.0


@dataclass(frozen=True)
class Request:
    """Who starts what: `uid`/`gid` are the VM's own, taken from the launcher's credentials.

    `builtin_vsock`: the VMM has a hybrid vsock of its own. `opens_as`: it opens disks and sockets once more
    by itself, as this account; None for one that uses the descriptors.
    """

    name: str
    uid: int
    gid: int
    relay_gid: int
    hybrid: bool
    boot: image.BootChoice
    root_readonly: bool
    monitor_kind: socket.SocketKind
    builtin_vsock: bool = False
    opens_as: Account | None = None
    vhost_user: tuple[str, ...] = ()
    ssh: bool = False
    owner: int = 0
    guest_files: Mapping[str, str] = field(default_factory=dict)
    """Below the guest's /run, by name: of its interfaces (vmsilod.network.guest) and shares."""
    huge_root: int | None = None
    """The image's root in huge pages: an open descriptor of boot.version; not closed here."""
    disks: disks.DiskRequest = field(default_factory=disks.DiskRequest)

    def fds(self) -> list[int]:
        return [] if self.huge_root is None else [self.huge_root]


@dataclass(frozen=True)
class Acquired:
    """Descriptors (owned by whoever holds this) and names. `host_port_fd` and `device_fd` are None in the
    other mode.
    """

    secret: str
    cid: int
    rundir: Path
    files: image.BootFiles
    kernel_fd: int
    initrd_fd: int | None
    root_fd: int
    monitor_fd: int
    device_fd: int | None
    host_port_fd: int | None
    root_pmem: bool = False
    root_huge: bool = False
    root_size: int = 0
    vhost_user_fds: list[int] = field(default_factory=list)
    disks: list[disks.OpenDisk] = field(default_factory=list)

    def channel(self, uid: int) -> dict[str, Any]:
        """How the relay reaches the guest."""
        if self.device_fd is not None:
            return {"type": "kernel", "cid": self.cid}
        return {"type": "hybrid", "path": str(self.rundir / "vsock" / "vsock"), "uid": uid}

    def fds(self) -> list[int]:
        every = (
            self.kernel_fd,
            self.initrd_fd,
            self.root_fd,
            self.monitor_fd,
            self.device_fd,
            self.host_port_fd,
        )
        fds = [*(fd for fd in every if fd is not None), *self.vhost_user_fds]
        return [*fds, *(disk.fd for disk in self.disks)]


def acquire(request: Request) -> Acquired:
    """Raises a VmsiloError, and then nothing is held but the run-time directory, which the release
    removes.
    """
    with ExitStack() as stack:

        def keep(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        files = image.find_boot_files(request.boot)
        image_check.require_whole(files)
        directory = rundir.create_rundir(request.name)
        secret = secrets.token_hex(SECRET_BYTES)
        kernel_fd = keep(image.open_file(files.kernel))
        root_fd = keep(
            disks.open_root(
                files.root,
                request.gid,
                writable=not request.root_readonly,
                of_image=request.boot.root_disk is None,
            )
            if request.huge_root is None
            else os.dup(request.huge_root)
        )
        plain_kernel = request.boot.kernel is not None and files.initrd is None
        shelf = directory if request.opens_as is not None else None
        ssh = ssh_keys.prepare_keys(request.name, files.login, request.owner) if request.ssh else None
        initrd_fd = (
            None
            if plain_kernel
            else keep(image.make_initrd(files.initrd, secret, ssh, shelf, request.guest_files))
        )
        monitor_fd = keep(rundir.bind_listener(directory / "monitor.sock", request.monitor_kind, 0o600))
        vhost_user_fds = [keep(fd) for fd in _open_vhost_user(request)]
        if request.opens_as is not None:
            vhost_user.require_disk_access(
                files.root, root_fd, request.opens_as, writable=not request.root_readonly
            )
        opened = []
        for disk in disks.open_disks(request.name, *plan_disks(request, files)):
            keep(disk.fd)
            opened.append(disk)
        device_fd = host_port_fd = None
        if request.hybrid or request.builtin_vsock:
            cid = vsock.HYBRID_CID
            folder = rundir.create_vsock_dir(directory)
            path = folder / f"vsock_{vsock.HOST_PORT}"
            host_port_fd = keep(
                rundir.bind_listener(path, socket.SOCK_STREAM, 0o600, (request.uid, request.gid))
            )
            rundir.hand_over_vsock_dir(folder, request.uid, request.relay_gid)
        else:
            cid, device_fd = vsock.acquire_kernel_cid(record.STATE_DIR / "next-cid")
            keep(device_fd)
        stack.pop_all()
        return Acquired(
            *(secret, cid, directory, files, kernel_fd, initrd_fd, root_fd, monitor_fd),
            *(device_fd, host_port_fd),
            root_pmem=request.root_readonly and image.is_pmem(files, root_fd),
            root_huge=request.huge_root is not None,
            root_size=os.fstat(root_fd).st_size,
            vhost_user_fds=vhost_user_fds,
            disks=opened,
        )


def plan_disks(request: Request, files: image.BootFiles) -> tuple[disks.DiskRequest, disks.Vmm]:
    """What the image's first process knows to use. An older one's overlay is in the guest's memory."""
    wanted = request.disks
    if wanted.persist_size is not None and not files.disks:
        raise StartFailed(
            f"image '{request.boot.image}' was built by a vmsilo that did not have persist",
            f"sudo vmsilo image build {request.boot.image}",
        )
    wanted = replace(wanted, encrypted=files.crypt) if files.disks else replace(wanted, overlay_size=None)
    return wanted, disks.Vmm(request.uid, request.gid, request.opens_as, files.uid)


def _open_vhost_user(request: Request) -> Iterator[int]:
    """One after the other, so that the caller keeps each before the next can fail."""
    for name in request.vhost_user:
        path = Path(name)
        if request.opens_as is None:
            yield vhost_user.connect_socket(path)
            continue
        fd = vhost_user.open_socket(path)
        yield fd
        vhost_user.require_socket_access(path, fd, request.opens_as)


def await_socket(path: Path) -> None:
    """Wait until the vsock device listens at `path`; its folder tells."""
    deadline = time.monotonic() + HYBRID_READY_SECONDS
    with INotify() as watch:
        watch.add_watch(path.parent, flags.CREATE | flags.MOVED_TO)
        while not path.exists():
            left = deadline - time.monotonic()
            if left <= 0:
                raise StartFailed(f"the vsock device did not create {path} in {HYBRID_READY_SECONDS:.0f} s")
            watch.read(timeout=int(left * 1000) + 1)
