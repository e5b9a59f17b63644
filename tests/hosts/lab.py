"""`make lab-test`: boots the lab and runs the suite tests/lab inside it, brings journals, results and
timings back, and fails on a journal line that nobody expected.

Each file is a part; then comes `leaving`, which leaves VMs running and devices isolated when the host is
shut down; `second`, after the next boot, looks at what the shutdown did and what the boot found. With file
names only those are run, with `--core` what is part of `make test`. What comes back is in .cache/lab.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from hosts import layers
from hosts.lab_layers import make_lab
from hosts.lab_machine import Lab

RESULTS = layers.CACHE / "lab"
LAB_TESTS = layers.REPO / "tests/lab"
CORE = ("test_vmm.py", "test_together.py")
"""What `make test` runs of them: `make lab-test` runs all."""
TRIES = 3
NO_TESTS = 5  # pytest's exit status when nothing was selected
VMMS = ("crosvm", "cloud-hypervisor")
"""VMMs without a Debian package: taken along where this machine has them in PATH."""
# Lines of our units at warning or above, and of all others at err or above, that belong to a clean run.
EXPECTED = (
    "Main process exited",  # tests end VMMs and guests in every way
    "Failed with result",
    "Killing process",
    "the guest did not shut down in",  # one is made to hold its shutdown up
    "0000:00:",  # PCI devices that a VM is refused, asked for by tests
    "there is no PCI device",
    "does not remap interrupts",
    "systemd-ssh-generator",  # the lab host itself has no vsock address
    "Failed to query local AF_VSOCK CID",  # systemd's ssh helpers, for the same reason
    "Unhandled WRMSR",  # what an emulated processor's KVM says of a guest's first steps
    "pam_env(",  # its root is minimal: no /etc/default/locale
    "firmware load for regulatory.db",
    "MTRR",  # what QEMU leaves to its firmware, and there is none
    "mtrr:",
)
JOURNAL = "journalctl -b {boot} -q --no-pager -o short-precise"
JOURNALCTL = "journalctl -q --no-pager -o cat"  # all boots
WARNINGS = f"{JOURNALCTL} -p warning -u 'vmsilo*'; {JOURNALCTL} -p err"
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
    """One pytest run. A lab whose own kernel crashed (QEMU's emulation of SVM is not perfect) gets another
    try; what the tests find fails at once.
    """
    for _ in range(TRIES):
        begin, boot = time.monotonic(), lab.find_boot()
        layers.say(f"lab, part {name}")
        command = PYTEST.format(name=name, what=what)
        status = subprocess.run(lab.ssh(command), stdin=subprocess.DEVNULL, check=False).returncode
        if status and lab.recover(boot):
            layers.say(f"lab, part {name}: the lab itself crashed ({lab.accelerator}); trying again")
            lab.run("rm -f /etc/vmsilo/vms.d/*.toml")
            continue
        verdict = "passed" if status in (0, NO_TESTS) else "FAILED"
        layers.say(f"lab, part {name}: {verdict} in {time.monotonic() - begin:.0f} s")
        return status in (0, NO_TESTS)
    return False


def find_unexpected(lab: Lab) -> list[str]:
    lines = lab.run(WARNINGS).stdout.splitlines()
    return [line for line in lines if line and not any(known in line for known in EXPECTED)]


def collect(lab: Lab) -> None:
    for boot in (-1, 0) if lab.boots > 1 else (0,):
        journal = lab.run(JOURNAL.format(boot=boot), check=False).stdout
        (RESULTS / f"journal-{lab.boots + boot}.txt").write_text(journal)
    lab.pull("/root/results", RESULTS)
    shutil.copy2(lab.console_log, RESULTS / "console.txt")


def main() -> int:
    layers.enter_private_mounts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    selected = sys.argv[1:]
    begin = time.monotonic()
    parts = make_lab()
    shutil.rmtree(RESULTS, ignore_errors=True)
    RESULTS.mkdir(parents=True)
    with Lab(parts) as lab:
        up = time.monotonic() - begin
        layers.say(f"the lab is up after {up:.0f} s ({lab.accelerator}); results go to .cache/lab")
        prepare(lab)
        try:
            core = selected == ["--core"]
            files = CORE if core else selected or sorted(path.name for path in LAB_TESTS.glob("test_*.py"))
            passed = True
            for file in files:
                what = f"-m 'not leaving and not second' lab/{Path(file).name}"
                passed = run_part(lab, Path(file).stem, what) and passed
            if core or not selected:
                marked = " ".join(f"lab/{file}" for file in CORE) if core else "lab"
                passed = run_part(lab, "leaving", f"-m leaving {marked}") and passed
                lab.restart()
                passed = run_part(lab, "second", f"-m second {marked}") and passed
            unexpected = find_unexpected(lab)
        finally:
            collect(lab)
    for line in unexpected:
        print(f"unexpected journal line: {line}", flush=True)
    layers.say(f"lab: {time.monotonic() - begin:.0f} s in all")
    return 0 if passed and not unexpected else 1


if __name__ == "__main__":
    sys.exit(main())
