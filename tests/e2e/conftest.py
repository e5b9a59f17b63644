"""One real guest for the whole tier: the VM `demo`, booted once by QEMU in the container host."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.container import Container

# Expressions for lines that are logged at warning or above in a clean run of these tests, and why.
EXPECTED = (
    "without hardware virtualisation",  # there is no KVM in the container host
    "guest did not shut down",  # a test hangs its guest on purpose
    "Main process exited",  # tests kill VMMs
    "Failed with result",
    "Killing process",
    "Control process exited",  # or vmsilod and with it the one that asks it to stop a VM
    "has had its socket already",  # a launcher asks again when vmsilod was killed
    "QEMU was killed",
    "its kernel panicked",
    "port 2223 of 127.0.0.1 is in use",  # a test takes a forwarded port
    "Failed to start vmsilo-ports-vm.service",
    "connection to vmsilo-relayd failed",  # a test kills the relay
    "vmsilo-relayd went away",
    "virtiofsd",  # tests kill one
    r"share@\S+: State 'stop-sigterm' timed out\. Killing\.",  # and stop one that does not serve yet
    "Failed to start vmsilo-files-share@",  # or kill vmsilod while one waits for its word
    "which is not our child",  # systemd 257 of a unit with PrivatePIDs=
    "cannot make /shared/files",  # the disk is full on purpose
    "Failed to start vmsilo-files-home",
    "Failed to start vmsilo-files-vm",
    "is a symbolic link",
    "belongs to uid 0",
    "could not be made",
    "is writing this disk",  # a test gives one disk to two VMs
    "begins like a qcow2 image",  # a guest writes such a header
    "Failed to start vmsilo-disks-vm.service",
    "Failed to start vmsilo-thief-vm.service",
    "what is forwarded is dropped by",  # beside other firewalls
)


@pytest.fixture(scope="session")
def host(booted_host: Container) -> Iterator[Container]:
    booted_host.configure(demo="memory = 1024\n", other="memory = 768\n")
    yield booted_host
    booted_host.run("vm-stop --force demo; vm-stop --force other", check=False)
    assert not booted_host.run("find /run/vmsilo/vm /run/vmsilo-relay -mindepth 1", check=False).stdout
    journal = booted_host.run("journalctl -q --no-pager -o cat -p warning -u 'vmsilo*'").stdout.splitlines()
    unexpected = [line for line in journal if not any(re.search(known, line) for known in EXPECTED)]
    assert not unexpected, "\n".join(unexpected)


@pytest.fixture
def demo(host: Container) -> Container:
    """The host with its VM demo running and ready."""
    host.run(["vm-start", "demo", "--wait"], user="user")
    return host
