"""`make lab-test`: boots the lab and runs the suite tests/lab inside it, brings journals, results and
timings back, and fails on a journal line that nobody expected.

Each file is a part; where the lab is emulated, two labs share the parts. One more is the shutdown: the tests
`leaving`, which leave VMs running and devices isolated when the host is shut down, and after the next boot
`second`, which look at what the shutdown did and what the boot found. With file names only those are run,
with `--core` what is part of `make test`. What comes back is in .cache/lab.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from hosts import layers
from hosts.lab_layers import make_lab
from hosts.lab_machine import MEMORY_MIB, Lab, find_accelerator

RESULTS = layers.CACHE / "lab"
LAB_TESTS = layers.REPO / "tests/lab"
CORE = ("test_vmm.py", "test_together.py")
"""What `make test` runs of them: `make lab-test` runs all."""
CORE_EMULATED = ("test_vmm.py",)
"""And where the lab is emulated, so that `make test` ends within an hour on two slow CPUs: three guests at
once on its one CPU take up to a quarter of an hour there."""
SHUTDOWN = "shutdown"
LONG = (
    *(SHUTDOWN, "test_storage.py", "test_outcomes.py", "test_network.py", "test_pci.py", "test_usb.py"),
    *("test_cloud_hypervisor.py", "test_vmm.py"),
)
"""The longest first, so that two labs end at about the same time."""
SPARE_MIB = 1024  # beside a lab's memory, for its QEMU
TRIES = 3
NO_TESTS = 5  # pytest's exit status when nothing was selected
VMMS = ("crosvm", "cloud-hypervisor")
"""VMMs without a Debian package: taken along where this machine has them in PATH."""
# Lines of our units at warning or above, and of all others at err or above, that belong to a clean run.
EXPECTED = (
    "Main process exited",  # tests end VMMs and guests in every way
    "Failed with result",
    "Killing process",
    "Control process exited",  # or a start whose VM is killed
    "was killed (SIGKILL)",
    "which is not our child",  # systemd 257 of a unit with PrivatePIDs=
    "begins like a qcow2 image",  # a guest writes such a header
    *("Failed to start vmsilo-store-vm.service", "Failed to start vmsilo-lab-"),  # refused on purpose
    *("Failed to start vmsilo-lonely-vm.service", "cannot open /run/no.sock"),
    "Failed to start vmsilo-own-disk-vm.service",  # and what only cloud-hypervisor is refused
    *("Failed to start vmsilo-shared-vm.service", "may not write /var/lib/vmsilo/own-disk"),
    *("may not connect to /run/lab-share/", "does not know one of its arguments"),
    "is not the starting main process of vmsilo-end-",  # a stop meets a start
    "; starts again in ",  # crashes that are made, of VMs with a restart policy
    "Memory cgroup out of memory: Killed process",  # as the test wants
    "the guest did not shut down in",  # one is made to hold its shutdown up
    "vmsilo-lab-three-vm.service: Stopping timed out",  # that one, where the launcher is too slow to say so
    "0000:00:",  # PCI devices that a VM is refused, asked for by tests
    "there is no PCI device",
    "does not remap interrupts",
    "systemd-ssh-generator",  # the lab host itself has no vsock address
    "Failed to query local AF_VSOCK CID",  # systemd's ssh helpers, for the same reason
    "Unhandled WRMSR",  # what an emulated processor's KVM says of a guest's first steps
    "mm_reap: preauth child",  # sshd of a lab that shuts down while we look whether it is up again
    'chroot("/run/sshd")',
    "watchdog did not stop!",  # at every reboot with QEMU's watchdog
    "pam_env(",  # its root is minimal: no /etc/default/locale
    "firmware load for regulatory.db",
    "MTRR",  # what QEMU leaves to its firmware, and there is none
    "mtrr:",
)
JOURNAL = "journalctl -b {boot} -q --no-pager -o short-precise"
JOURNALCTL = "journalctl -q --no-pager -o cat"  # all boots
WARNINGS = f"{JOURNALCTL} -p warning -u 'vmsilo*'; {JOURNALCTL} -p err"
_OUTPUT = threading.Lock()
PYTEST = (
    "cd /root/tests && python3 -u -m pytest -q -p no:cacheprovider --import-mode=importlib --durations=15"
    " --junitxml=/root/results/{name}.xml {what}"
)


def take_vmms(lab: Lab) -> None:
    for name in VMMS:
        path = shutil.which(name)
        if path is None:
            layers.say(f"{name} is not in PATH: its tests in the lab will be skipped")
        else:
            command = f"install -m 755 /dev/stdin /usr/local/bin/{name}"
            subprocess.run(lab.ssh(command), input=Path(path).read_bytes(), check=True)


def prepare(lab: Lab) -> None:
    """Tests and foreign VMMs go in; vmsilo starts, as README says."""
    take_vmms(lab)
    lab.push(layers.REPO / "tests/lab", "/root/tests/lab")
    lab.run("mkdir -p /root/results")
    lab.run("""printf 'user = "user"\\nshared_home = false\\n' > /etc/vmsilo/vmsilo.toml""")
    lab.run("systemctl enable --now vmsilod.socket vmsilo-relayd.socket vmsilod.service")


def run_part(lab: Lab, name: str, what: str) -> bool:
    """One pytest run. A lab whose own kernel crashed, or one of whose guests stood still (QEMU's emulation
    of SVM is not perfect), gets another try; what the tests find fails at once.
    """
    for _ in range(TRIES):
        begin, boot = time.monotonic(), lab.find_boot()
        layers.say(f"lab {lab.number}, part {name}")
        command = lab.ssh(PYTEST.format(name=name, what=what))
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        crashed = done.returncode != 0 and lab.recover(boot)
        still = take_standstill(lab) if done.returncode else ""
        verdict = "the lab itself crashed" if crashed else still or f"pytest says {done.returncode}"
        passed = done.returncode in (0, NO_TESTS)
        seconds = time.monotonic() - begin
        with _OUTPUT:
            print(done.stdout.decode(errors="replace"), end="", flush=True)
            layers.say(
                f"lab {lab.number}, part {name}: {'passed' if passed else verdict} in {seconds:.0f} s"
            )
        if not (crashed or still):
            return passed
        lab.run("rm -f /etc/vmsilo/vms.d/*.toml")
    return False


def take_standstill(lab: Lab) -> str:
    """What tests/lab/standstill.py found, if anything."""
    mark = "/run/lab-standstill"
    return lab.run(f"cat {mark} && rm {mark}", check=False).stdout.strip()


def find_unexpected(lab: Lab) -> list[str]:
    lines = lab.run(WARNINGS).stdout.splitlines()
    return [line for line in lines if line and not any(known in line for known in EXPECTED)]


def collect(lab: Lab) -> None:
    for boot in (-1, 0) if lab.boots > 1 else (0,):
        journal = lab.run(JOURNAL.format(boot=boot), check=False).stdout
        (RESULTS / f"journal-{lab.number}-{lab.boots + boot}.txt").write_text(journal)
    lab.pull("/root/results", RESULTS)
    shutil.copy2(lab.console_log, RESULTS / f"console-{lab.number}.txt")


@dataclass
class Work:
    """The parts that no lab has taken yet, and what came of the others."""

    parts: list[str]
    shutdown: str
    """What `leaving` and `second` are to be found in."""
    passed: bool = True
    unexpected: list[str] = field(default_factory=list)


def work_off(lab: Lab, work: Work) -> None:
    """Boot one lab and run parts in it until none is left."""
    begin = time.monotonic()
    with lab:
        layers.say(f"lab {lab.number} is up after {time.monotonic() - begin:.0f} s ({lab.accelerator})")
        prepare(lab)
        try:
            while work.parts:  # a pop is one step: the labs' threads share the list
                name = work.parts.pop(0)
                if name == SHUTDOWN:
                    work.passed = run_part(lab, "leaving", f"-m leaving {work.shutdown}") and work.passed
                    lab.restart()
                    work.passed = run_part(lab, "second", f"-m second {work.shutdown}") and work.passed
                    continue
                what = f"-m 'not leaving and not second' lab/{name}"
                work.passed = run_part(lab, Path(name).stem, what) and work.passed
            work.unexpected += find_unexpected(lab)
        finally:
            collect(lab)


def count_labs(parts: int) -> int:
    """An emulated lab keeps one CPU busy, whatever it has inside: as many as fit, and at most two."""
    available = int(re.findall(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[0]) // 1024
    fit = min(os.cpu_count() or 1, available // (MEMORY_MIB + SPARE_MIB), parts, 2)
    return max(fit, 1) if find_accelerator() == "tcg" else 1


def plan_work(selected: list[str]) -> Work:
    core = selected == ["--core"]
    small = CORE_EMULATED if find_accelerator() == "tcg" else CORE
    names = small if core else [Path(name).name for name in selected]
    parts = list(names) or sorted(path.name for path in LAB_TESTS.glob("test_*.py"))
    if not selected or (core and small == CORE):
        parts.append(SHUTDOWN)
    parts.sort(key=lambda name: LONG.index(name) if name in LONG else len(LONG))
    return Work(parts, " ".join(f"lab/{name}" for name in names) if core else "lab")


def main() -> int:
    layers.enter_private_mounts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin = time.monotonic()
    parts = make_lab(core=sys.argv[1:] == ["--core"])
    shutil.rmtree(RESULTS, ignore_errors=True)
    RESULTS.mkdir(parents=True)
    work = plan_work(sys.argv[1:])
    count = count_labs(len(work.parts))
    layers.say(f"results go to .cache/lab; {count} lab{'s' if count > 1 else ''} side by side")
    labs = [Lab(parts, number=number + 1) for number in range(count)]
    # On the way out the labs end first, and with them what the threads wait for.
    with ThreadPoolExecutor(count) as pool, ExitStack() as stack:
        for lab in labs:
            stack.callback(lab.end)
        for future in [pool.submit(work_off, lab, work) for lab in labs]:
            future.result()
    for line in work.unexpected:
        print(f"unexpected journal line: {line}", flush=True)
    layers.say(f"lab: {time.monotonic() - begin:.0f} s in all")
    return 0 if work.passed and not work.unexpected else 1


if __name__ == "__main__":
    sys.exit(main())
