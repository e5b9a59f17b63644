"""VMs under the real cloud-hypervisor: its own vsock, a root that is persistent memory, memory that grows,
ends of every kind. And vhost-user devices, under each VMM that is there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lab.conftest import require_program

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.conftest import Host

VIRTIOFSD = Path("/usr/libexec/virtiofsd")
BINARIES = {"cloud-hypervisor": "cloud-hypervisor", "crosvm": "crosvm", "qemu": "qemu-system-x86_64"}
SILO = """
vmm = "cloud-hypervisor"
memory = 512
memory_max = 1024
start_timeout = 600
"""


@pytest.fixture(scope="module")
def silo(host: Host) -> Iterator[str]:
    require_program("cloud-hypervisor")
    with host.vm("silo", SILO) as name:
        host.vm_run(name, "true")
        yield name


def memory_of(host: Host, name: str) -> dict[str, int]:
    memory: dict[str, int] = json.loads(host.read(f"vmsilo memory --json {name}"))
    return memory


def total_of(host: Host, name: str) -> int:
    """MiB, as the guest says."""
    text = host.vm_run(name, "cat", "/proc/meminfo").stdout
    return int(text.split()[1]) >> 10


def wait_for_memory(host: Host, name: str, size: int) -> None:
    deadline = time.monotonic() + 300
    while memory_of(host, name)["actual"] != size:
        assert time.monotonic() < deadline, memory_of(host, name)
        time.sleep(0.5)


def end_of(host: Host, name: str) -> dict[str, Any]:
    host.wait_until(f"vmsilo status {name} | grep -qE '^State *(stopped|failed)'", seconds=300)
    return host.vms()[name]


def test_command_runs_without_a_vsock_of_the_host(host: Host, silo: str) -> None:
    assert host.vm_run(silo, "echo", "warm").stdout == "warm\n"
    assert host.vms()[silo]["Vmm"] == "cloud-hypervisor"
    assert "vhost-vsock" not in host.read(f"ls -l /proc/{host.main_pid(silo)}/fd")


def test_root_is_persistent_memory_that_is_read_only(host: Host, silo: str) -> None:
    mounted = host.run(f"vm-run --root {silo} dmesg").stdout
    assert "vmsilo-init: root /dev/pmem0 (erofs, ro)" in mounted


def test_every_thread_is_filtered_and_nothing_is_privileged(host: Host, silo: str) -> None:
    pid = host.main_pid(silo)
    filtered = host.read(f"grep -h ^Seccomp: /proc/{pid}/task/*/status | sort -u")
    assert filtered.split() == ["Seccomp:", "2"]
    status = host.read(f"cat /proc/{pid}/status")
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert "--landlock" in host.read(f"tr '\\0' ' ' < /proc/{pid}/cmdline")


def test_others_do_not_reach_the_vsock_of_the_vm(host: Host, silo: str) -> None:
    path = f"/run/vmsilo/vm/{silo}/vsock/vsock"
    denied = host.run(f"test -e {path}", user="user", check=False)
    assert denied.returncode == 1
    assert host.run(f"test -S {path}").returncode == 0


def test_memory_grows_and_shrinks_and_the_guest_sees_it(host: Host, silo: str) -> None:
    small = total_of(host, silo)
    host.run(f"vmsilo memory {silo} 1G", check=False)  # status 1: not within 10 s, on a slow machine
    wait_for_memory(host, silo, 1024)
    assert total_of(host, silo) - small > 450
    host.run(f"vmsilo memory {silo} 512", check=False)
    wait_for_memory(host, silo, 512)
    assert total_of(host, silo) == pytest.approx(small, abs=16)


@pytest.mark.parametrize("size", ["511", "1026", "513"])
def test_size_outside_of_what_is_configured_is_refused(host: Host, silo: str, size: str) -> None:
    refused = host.run(f"vmsilo memory {silo} {size}", check=False)
    assert refused.returncode == 1
    assert f"{size} MiB" in refused.stderr


def test_guest_reboots_in_place(host: Host, silo: str) -> None:
    pid, boot = host.main_pid(silo), host.vm_run(silo, "cat", "/proc/sys/kernel/random/boot_id").stdout
    host.run(f"vm-run --root {silo} systemctl reboot", check=False)
    host.wait_until(f"vmsilo status {silo} | grep -q '^State *starting'", seconds=120)
    assert host.vm_run(silo, "cat", "/proc/sys/kernel/random/boot_id").stdout != boot
    assert host.main_pid(silo) == pid


def test_panic_is_a_reboot_in_place(host: Host, silo: str) -> None:
    pid, boot = host.main_pid(silo), host.vm_run(silo, "cat", "/proc/sys/kernel/random/boot_id").stdout
    host.run(f"vm-run --root --detach {silo} sh -c 'sleep 1; echo c > /proc/sysrq-trigger'")
    deadline = time.monotonic() + 600
    while True:
        answer = host.vm_run(silo, "cat", "/proc/sys/kernel/random/boot_id", check=False)
        if answer.returncode == 0 and answer.stdout != boot:
            break
        assert time.monotonic() < deadline
        time.sleep(1)
    assert host.main_pid(silo) == pid


def test_guest_that_powers_off_leaves_a_stopped_vm_and_nothing_behind(host: Host, silo: str) -> None:
    host.run(f"vm-run --root --detach {silo} systemctl poweroff")
    vm = end_of(host, silo)
    assert (vm["State"], vm["LastResult"]) == ("stopped", "")
    host.wait_until(f"test ! -e /run/vmsilo/vm/{silo}")


def test_power_button_ends_a_guest_whose_agent_is_gone(host: Host, silo: str) -> None:
    host.vm_run(silo, "true")
    host.run(f"vm-run --root {silo} systemctl stop vmsilo-agent", check=False)
    host.run(f"vm-stop --timeout 30 {silo}")
    assert host.vms()[silo]["State"] == "stopped"


def test_start_that_fails_says_why(host: Host) -> None:
    require_program("cloud-hypervisor")
    text = 'vmm = "cloud-hypervisor"\n[cloud_hypervisor]\nextra_args = ["--no-such-option"]\n'
    with host.vm("wrong", text):
        host.run("vm-start --wait wrong", check=False)
        vm = end_of(host, "wrong")
        assert vm["State"] == "failed"
        assert "does not know one of its arguments" in vm["LastResult"]


def test_writable_disk_needs_the_right_of_the_vms_own_user(host: Host) -> None:
    require_program("cloud-hypervisor")
    disk = Path("/var/lib/vmsilo/own-disk")  # vmsilod has a /tmp of its own
    disk.write_bytes(bytes(1 << 20))
    disk.chmod(0o600)
    text = f'vmm = "cloud-hypervisor"\nroot_disk = "{disk}"\nroot_disk_readonly = false\n'
    with host.vm("own-disk", text):
        refused = host.run("vm-start own-disk", check=False)
        assert refused.returncode == 1
        assert "may not write" in refused.stderr
        assert "0666" in refused.stderr
    disk.unlink()


@pytest.fixture
def share(tmp_path: Path) -> Path:
    (tmp_path / "hello").write_text("from the host\n")
    return tmp_path


def grow_beside_the_share(host: Host, share: Path) -> None:
    """The backend maps what is plugged in later, too, where the guest's page cache is then."""
    small = total_of(host, "shared")
    host.run("vmsilo memory shared 1024", check=False)  # status 1: not within 10 s, on a slow machine
    wait_for_memory(host, "shared", 1024)
    assert total_of(host, "shared") - small > 450
    copy = "head -c 16M /dev/urandom > /dev/shm/x && cp /dev/shm/x /mnt/share/new && sha256sum /dev/shm/x"
    digest = host.run(f"vm-run --root shared sh -c '{copy}'").stdout.split()[0]
    assert hashlib.sha256((share / "new").read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("vmm", BINARIES)
def test_directory_is_shared_by_virtiofsd(host: Host, vmm: str, share: Path) -> None:
    require_program(BINARIES[vmm])
    program = shutil.which("virtiofsd") or (str(VIRTIOFSD) if VIRTIOFSD.exists() else "")
    if not program:
        pytest.skip("virtiofsd is not installed")
    folder = Path("/run/lab-share")
    folder.mkdir(mode=0o700, exist_ok=True)
    socket = folder / f"{vmm}.sock"
    unit = f"lab-share-{vmm}"
    host.run(
        f"systemd-run -q --collect --unit={unit} {program} --socket-path={socket} --shared-dir={share}"
        " --tag=share --sandbox=chroot"
    )
    try:
        host.wait_until(f"test -S {socket}")
        options = {"crosvm": "max-queue-size = 1024"}.get(vmm, 'tag = "share"')
        device = f'{{ type = "fs", socket = "{socket}", {options} }}'
        text = f'vmm = "{vmm}"\nmemory = 512\nstart_timeout = 600\nvhost_user = [{device}]\n'
        text += "" if vmm == "crosvm" else "memory_max = 1024\n"
        with host.vm("shared", text):
            if vmm == "cloud-hypervisor":
                refused = host.run("vm-start shared", check=False)
                assert "may not connect" in refused.stderr
                socket.chmod(0o666)
            command = "mkdir -p /mnt/share && mount -t virtiofs share /mnt/share && cat /mnt/share/hello"
            assert host.run(f"vm-run --root shared sh -c '{command}'").stdout == "from the host\n"
            if vmm != "crosvm":
                grow_beside_the_share(host, share)
    finally:
        host.run(f"systemctl stop {unit}", check=False)


def test_backend_that_is_not_there_fails_the_start(host: Host) -> None:
    with host.vm("lonely", 'vmm = "qemu"\nvhost_user = [{ type = "fs", socket = "/run/no.sock" }]\n'):
        refused = host.run("vm-start lonely", check=False)
        assert refused.returncode == 1
        assert "cannot open /run/no.sock" in refused.stderr
