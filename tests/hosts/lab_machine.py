"""A booted lab: a QEMU machine that is a whole host, with KVM, vhost-vsock, an IOMMU, a spare NIC, a USB
controller with a stick, an NVMe disk.

Used by the lab's programs, as root. A context manager: on the way out the machine is ended, and what it
wrote is gone. Commands go in by ssh through its first NIC; there is no way out of it.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import tempfile
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hosts import layers
from hosts.lab_layers import NIC_MAC, PASSED_MAC, SPARE_SIZE, LabParts

if TYPE_CHECKING:
    from types import TracebackType

BOOT_SECONDS = 300
MEMORY_MIB = 5120
STICK_SERIAL = "VMSILO-STICK-1"
COMMAND_LINE = "root=/dev/vda rw console=ttyS0 intel_iommu=on iommu=pt systemd.show_status=yes loglevel=4"
NESTED = ("/sys/module/kvm_intel/parameters/nested", "/sys/module/kvm_amd/parameters/nested")

Result = subprocess.CompletedProcess[str]


def find_accelerator() -> str:
    """KVM where a guest of this machine can have KVM itself; VMSILO_LAB_ACCEL=tcg or kvm overrides."""
    wanted = os.environ.get("VMSILO_LAB_ACCEL")
    if wanted:
        return wanted
    for path in map(Path, NESTED):
        if path.exists() and path.read_text().strip() in ("Y", "1") and Path("/dev/kvm").exists():
            return "kvm"
    return "tcg"


class Lab(AbstractContextManager["Lab"]):
    """`run` executes in it as root or as the desktop user. `console_log` is what its serial line said."""

    def __init__(self, parts: LabParts, *, memory: int = MEMORY_MIB, number: int = 1) -> None:
        self.number = number
        self._parts = parts
        self._memory = memory
        self._stack = ExitStack()
        self._qemu: subprocess.Popen[bytes] | None = None
        self.accelerator = find_accelerator()
        self.scratch = Path()
        self.port = 0
        self.boots = 0

    def __enter__(self) -> Lab:
        with ExitStack() as stack:
            stack.enter_context(layers.using(self._parts.disk.parent))
            stack.enter_context(layers.using(self._parts.root.parent))
            self.scratch = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="vmsilo-lab-", dir="/var/tmp"))
            )
            stack.callback(self.end)
            self._make_disks()
            self._boot()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def console_log(self) -> Path:
        return self.scratch / "console.log"

    def _make_disks(self) -> None:
        for name in ("nvme", "stick"):
            with (self.scratch / f"{name}.raw").open("wb") as file:
                file.truncate(SPARE_SIZE)

    def _inside(self, command: list[str]) -> list[str]:
        """A command with the lab root's programs: this machine's own QEMU may be older, or none."""
        binds = [
            "--setenv=TMPDIR=/scratch",
            f"--bind-ro={self._parts.disk.parent}:/parts",
            f"--bind={self.scratch}:/scratch",
        ]
        if self.accelerator == "kvm":
            binds.append("--bind=/dev/kvm")
        return [
            *("setpriv", "--pdeathsig", "KILL", "systemd-nspawn", "--quiet", "--register=no", "--keep-unit"),
            *(
                "--as-pid2",
                "--capability=all",
                "--console=pipe",
                "--volatile=overlay",
                "-D",
                str(self._parts.root),
            ),
            *(*binds, "--", *command),
        ]

    def _boot(self) -> None:
        """Start the machine and wait until it can be logged in to."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        with (self.scratch / "qemu.log").open("wb") as log:
            self._qemu = subprocess.Popen(
                self._inside(self._qemu_argv()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._await_login("")

    def _await_login(self, old_boot: str) -> None:
        """Until a boot other than `old_boot` (a boot ID) answers; then one connection serves all calls."""
        self.boots += 1
        deadline = time.monotonic() + BOOT_SECONDS
        while self.find_boot() in ("", old_boot):
            assert self._qemu is not None
            if self._qemu.poll() is not None or time.monotonic() > deadline:
                logs = [self.scratch / "qemu.log", self.console_log]
                said = "".join(log.read_text(errors="replace")[-3000:] for log in logs if log.exists())
                raise AssertionError(f"the lab did not come up; its console:\n{said}")
            time.sleep(1)
        quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        subprocess.Popen(self.ssh("", "-M", "-N"), start_new_session=True, **quiet)  # ends with the machine
        while not self._shared.exists():
            time.sleep(0.1)

    def find_boot(self) -> str:
        return self.run("cat /proc/sys/kernel/random/boot_id", check=False, timeout=60).stdout.strip()

    def _qemu_argv(self) -> list[str]:
        kvm = self.accelerator == "kvm"
        return [
            *("qemu-system-x86_64", "-M", "q35", "-nodefaults", "-display", "none"),
            *("-accel", "kvm" if kvm else "tcg,thread=multi", "-cpu", "host" if kvm else "max"),
            # One where SVM is emulated: with two in parallel, guests hang on an instruction that faults
            # for ever, and the lab's own kernel crashes (QEMU 10.0).
            *("-smp", "2" if kvm else "1", "-m", f"{self._memory}M", "-device", "intel-iommu,intremap=off"),
            *("-serial", f"file:/scratch/{self.console_log.name}"),
            *(
                "-kernel",
                f"/parts/{self._parts.kernel.name}",
                "-initrd",
                f"/parts/{self._parts.initrd.name}",
            ),
            *("-append", COMMAND_LINE),
            # The overlay of snapshot=on lives until QEMU ends, so over a reboot.
            *("-drive", f"if=virtio,file=/parts/{self._parts.disk.name},format=raw,snapshot=on"),
            *("-netdev", f"user,id=n0,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22"),
            *("-device", f"e1000e,netdev=n0,mac={NIC_MAC},addr=10"),
            *("-device", f"e1000e,mac={PASSED_MAC},addr=11"),
            *("-drive", "if=none,id=nvme,file=/scratch/nvme.raw,format=raw,cache=unsafe"),
            *("-device", "nvme,drive=nvme,serial=vmsilo-nvme,addr=12"),
            *("-device", "qemu-xhci,id=xhci,addr=13", "-device", "usb-tablet,bus=xhci.0"),
            *("-drive", "if=none,id=stick,file=/scratch/stick.raw,format=raw,cache=unsafe"),
            *("-device", f"usb-storage,bus=xhci.0,drive=stick,serial={STICK_SERIAL}"),
            *("-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"),
        ]

    @property
    def _shared(self) -> Path:
        return self.scratch / f"ssh-{self.boots}"

    def ssh(self, command: str = "", *options: str, user: str = "root") -> list[str]:
        """The ssh command line; without `command` a login. One connection is shared by all calls."""
        remote = [command] if command else []
        if command and user != "root":
            remote = [
                f"setpriv --reuid={user} --regid={user} --init-groups env HOME=/home/{user} USER={user} "
                f"sh -c {shlex.quote(command)}"
            ]
        return [
            *("ssh", "-F", "none", "-i", str(self._parts.key), "-p", str(self.port), "-o", "BatchMode=yes"),
            *(
                "-o",
                "StrictHostKeyChecking=no",
                "-o",
                "UserKnownHostsFile=/dev/null",
                "-o",
                "LogLevel=ERROR",
            ),
            *(
                "-o",
                "ServerAliveInterval=15",
                "-o",
                "ServerAliveCountMax=4",
                "-o",
                "ConnectTimeout=20",
                "-o",
                f"ControlPath={self._shared}",
                *options,
            ),
            *("root@127.0.0.1", *remote),
        ]

    def run(self, command: str, *, user: str = "root", **options: Any) -> Result:
        """A shell command in the lab; `check` is on unless said otherwise."""
        check = options.pop("check", True)
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        done: Result = subprocess.run(
            self.ssh(command, user=user),
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            **options,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{command} exited with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            )
        return done

    def push(self, source: Path, target: str) -> None:
        """Copy a folder of this machine into a new folder of the lab."""
        tar = subprocess.run(
            ["tar", "-C", str(source), "--exclude=__pycache__", "-cf", "-", "."],
            check=True,
            capture_output=True,
        ).stdout
        subprocess.run(self.ssh(f"mkdir -p {target} && tar -C {target} -xf -"), input=tar, check=True)

    def pull(self, source: str, target: Path) -> None:
        """Copy a folder of the lab into a folder of this machine."""
        tar = subprocess.run(
            self.ssh(f"tar -C {source} -cf - ."), stdin=subprocess.DEVNULL, check=True, capture_output=True
        ).stdout
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["tar", "-C", str(target), "-xf", "-"], input=tar, check=True)

    def recover(self, old: str) -> bool:
        """Whether the machine has booted anew by itself since the boot `old`; waits until it is up again."""
        if self.find_boot() == old:
            return False
        self._await_login(old)
        return True

    def restart(self) -> None:
        """Shut down in order and boot again from what is on disk."""
        old = self.find_boot()
        self.run("systemctl reboot", check=False)
        self._await_login(old)

    def end(self) -> None:
        """End the machine at once; whoever waits for it fails."""
        qemu, self._qemu = self._qemu, None
        if qemu is not None and qemu.poll() is None:
            qemu.terminate()
            qemu.wait()
