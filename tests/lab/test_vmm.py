"""Each VMM under the product's own units with KVM and kernel vsock: cold and warm calls, and what the kernel
says of the VMM's rights.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .conftest import VMMS as ALL
from .conftest import require_program

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Host

VMMS = {name: how for name, how in ALL.items() if name != "cloud-hypervisor"}  # that has a file of its own
RESULTS = Path("/root/results/timings.json")
CAP_FIELDS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def record_timing(**values: object) -> None:
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*rows, values], indent=1))


def read_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.partition(":")[0]: line.partition(":")[2].strip() for line in lines}


@pytest.fixture(scope="module", params=VMMS)
def vmm(request: pytest.FixtureRequest, host: Host) -> Iterator[str]:
    """A VM that its first command started cold."""
    binary, text = VMMS[request.param]
    require_program(binary)
    with host.vm("lab-vmm", f"memory = 640\nstart_timeout = 900\nssh = false\n{text}") as name:
        begin = time.monotonic()
        assert host.vm_run(name, "uname", "-s").stdout == "Linux\n"
        cold = time.monotonic() - begin
        begin = time.monotonic()
        host.vm_run(name, "true")
        record_timing(vmm=request.param, cold=cold, warm=time.monotonic() - begin)
        yield str(request.param)


def test_kvm_and_kernel_vsock_carry_the_vm(vmm: str, host: Host) -> None:
    argv = Path(f"/proc/{host.main_pid('lab-vmm')}/cmdline").read_text()
    assert "tcg" not in argv
    assert "vhost-user" not in argv
    assert host.read("systemctl list-units --no-legend 'vmsilo-*vsock*'") == ""
    # The guest has the CID that the VMM was given, not the fixed one of a hybrid channel.
    ask = "import fcntl,struct; print(*struct.unpack('I', fcntl.ioctl(open('/dev/vsock'), 0x7b9, bytes(4))))"
    cid = host.vm_run("lab-vmm", "python3", "-c", ask).stdout.strip()  # 0x7b9: GET_LOCAL_CID
    assert f"cid={cid}" in argv
    assert "guest ready" in host.read("systemctl show -P StatusText vmsilo-lab-vmm-vm")


def test_warm_commands_carry_bytes_both_ways(vmm: str, host: Host) -> None:
    megabyte = "x" * (1 << 20)
    assert host.vm_run("lab-vmm", "wc", "-c", input=megabyte).stdout.split() == [str(1 << 20)]
    assert len(host.vm_run("lab-vmm", "head", "-c", str(4 << 20), "/dev/zero").stdout) == 4 << 20
    assert host.vm_run("lab-vmm", "sh", "-c", "exit 7", check=False).returncode == 7


def test_without_an_interface_a_vm_is_offline(vmm: str, host: Host) -> None:
    assert host.vm_run("lab-vmm", "ls", "/sys/class/net").stdout.split() == ["lo"]
    own = host.read("hostname -I").split()[0]
    refused = host.vm_run("lab-vmm", "busybox", "nc", own, "22", check=False)
    assert "unreachable" in refused.stderr
    assert host.vms()["lab-vmm"]["State"] == "running"
    pid = host.main_pid("lab-vmm")
    assert "/dev/net/tun" not in host.read(f"ls -l /proc/{pid}/fd")


def test_without_ssh_the_port_is_closed(vmm: str, host: Host) -> None:
    connect = f"import socket; socket.socket(socket.AF_VSOCK).connect(({host.vms()['lab-vmm']['Cid']}, 22))"
    assert "ConnectionResetError" in host.run(f'python3 -c "{connect}"', check=False).stderr


def test_kernel_reports_an_unprivileged_vmm(vmm: str, host: Host) -> None:
    main = host.main_pid("lab-vmm")
    unit = host.read("systemctl show -P ControlGroup vmsilo-lab-vmm-vm")
    pids = [int(pid) for pid in Path(f"/sys/fs/cgroup{unit}/cgroup.procs").read_text().split()]
    assert main in pids
    owner = read_status(main)["Uid"].split()[0]
    assert int(owner) >= 61184  # DynamicUser=: 61184 to 65519 (systemd.exec(5))
    for pid in pids:
        status = read_status(pid)
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        if Path(f"/proc/{pid}/ns/user").readlink() == Path("/proc/self/ns/user").readlink():
            assert set(status["Uid"].split()) == {owner}
            assert {status[field] for field in CAP_FIELDS} == {"0000000000000000"}
        else:
            assert vmm == "crosvm"  # its jails; what they may do, they may do to themselves
    interfaces = host.read(f"nsenter -t {main} -n ip -o link | cut -d: -f2").split()
    assert interfaces == ["lo"]


def test_device_policy_is_closed(vmm: str, host: Host) -> None:
    """The filter on the unit's cgroup, tried as root from inside it: no other right is in the way."""
    unit = host.read("systemctl show -P ControlGroup vmsilo-lab-vmm-vm")
    script = f"echo $$ > /sys/fs/cgroup{unit}/cgroup.procs; exec 3<>%s"
    assert host.run(f"sh -c '{script % '/dev/kvm'}'").returncode == 0
    assert host.run(f"sh -c '{script % '/dev/null'}'").returncode == 0
    for node in (
        "/dev/vda",
        "/dev/vhost-vsock",
        "/dev/vhost-net",
        "/dev/mem",
        "/dev/vfio/vfio",
        "/dev/input/event0",
    ):
        denied = host.run(f"sh -c '{script % node}'", check=False)
        assert "Operation not permitted" in denied.stderr, node


def test_stop_is_graceful(vmm: str, host: Host) -> None:
    begin = time.monotonic()
    host.run("vm-stop lab-vmm", user="user")
    record_timing(vmm=vmm, stop=time.monotonic() - begin)
    assert host.read("systemctl show -P Result vmsilo-lab-vmm-vm") == "success"
    vm = host.vms()["lab-vmm"]
    assert (vm["State"], vm["LastOutcome"]) == ("stopped", "stopped")
    assert "did not shut down" not in host.journal("lab-vmm")
