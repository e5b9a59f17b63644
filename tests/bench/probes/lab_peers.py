"""Runs `true` in one image by one of several ways, cold and warm, and says how long it took. In the lab.

argv: names, or NUMBER CALLS: the way of that number is started, called CALLS times and ended. Prints the
names, or the times in seconds and, where it could not be measured, why. vmsilo's VM and libvirt's domain
exist only while this runs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MEMORY, CPUS = 768, 2
COLD_SECONDS, SETTLE_SECONDS, POLL_SECONDS = 180, 5, 0.05
CONFIG = Path("/etc/vmsilo/vms.d")
SCRATCH = Path("/var/lib/libvirt/images/bench")  # where libvirt's profile and user may read
USER = "user"
CID = 4711
PARAMS = "console=hvc0 systemd.show_status=yes panic=-1 random.trust_cpu=on systemd.hostname=bench"
ROOT = "vmsilo.root=/dev/vda ro"
AGENT = "org.qemu.guest_agent.0"
DOMAIN = f"""<domain type='kvm'>
  <name>bench</name><memory unit='MiB'>{MEMORY}</memory><vcpu>{CPUS}</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{SCRATCH}/vmlinuz</kernel><initrd>{SCRATCH}/initrd</initrd><cmdline>{PARAMS} {ROOT}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='host-passthrough'/>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{SCRATCH}/root.erofs'/>
      <target dev='vda' bus='virtio'/><readonly/>
    </disk>
    <channel type='unix'><target type='virtio' name='{AGENT}'/></channel>
    <console type='pty'><target type='virtio'/></console>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
</domain>
"""


class Unusable(Exception):
    """Why a way cannot be measured here."""


@dataclass
class Way:
    name: str
    prepare: Callable[[], None]
    cold: Callable[[], None]
    """Starts a stopped VM; returns when `true` has ended in it."""
    warm: Callable[[], None]
    stop: Callable[[], None]
    cleanup: Callable[[], None]
    cold_times: list[float] = field(default_factory=list)
    warm_times: list[float] = field(default_factory=list)
    why_not: str = ""


def run(argv: list[str], *, user: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=COLD_SECONDS,
        check=False,
        user=user,
        group=user,
        extra_groups=[] if user else None,
    )
    if check and done.returncode:
        raise Unusable(f"{' '.join(argv)} exited with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done


def retry(attempt: Callable[[], bool]) -> None:
    """As a script would wait."""
    deadline = time.monotonic() + COLD_SECONDS
    while not attempt():
        if time.monotonic() > deadline:
            raise Unusable(f"no command ran within {COLD_SECONDS} s")
        time.sleep(POLL_SECONDS)


def reload_vmsilo() -> None:
    run(["busctl", "call", "org.vmsilo1", "/org/vmsilo1", "org.vmsilo1.Manager", "Reload"])


def make_vmsilo(name: str, label: str, program: str, settings: str) -> Way:
    file = CONFIG / f"{name}.toml"

    def prepare() -> None:
        if shutil.which(program) is None:
            raise Unusable(f"{program} is not in PATH")
        file.write_text(f'image = "bench"\nmemory = {MEMORY}\ncpus = {CPUS}\n{settings}')
        reload_vmsilo()

    def call() -> None:
        run(["vm-run", name, "true"], user=USER)

    def stop() -> None:
        run(["vm-stop", name], user=USER)

    def cleanup() -> None:
        run(["vm-stop", "--force", name], check=False)
        file.unlink(missing_ok=True)
        reload_vmsilo()

    return Way(label, prepare, call, call, stop, cleanup)


def ask_agent(request: dict[str, object]) -> dict[str, object] | None:
    done = run(["virsh", "qemu-agent-command", "bench", json.dumps(request)], check=False)
    if done.returncode:
        return None  # not connected yet
    answer: dict[str, object] = json.loads(done.stdout)["return"]
    return answer


def call_agent() -> None:
    pids: list[object] = []

    def begun() -> bool:
        answer = ask_agent(
            {"execute": "guest-exec", "arguments": {"path": "/bin/true", "capture-output": True}}
        )
        pids.extend([answer["pid"]] if answer else [])
        return bool(pids)

    def ended() -> bool:
        answer = ask_agent({"execute": "guest-exec-status", "arguments": {"pid": pids[0]}})
        return answer is not None and bool(answer["exited"])

    retry(begun)
    retry(ended)


def make_virsh() -> Way:
    def prepare() -> None:
        if shutil.which("virsh") is None:
            raise Unusable("virsh is not in PATH")
        (SCRATCH / "bench.xml").write_text(DOMAIN)
        run(["virsh", "undefine", "bench"], check=False)  # of a time when the lab crashed
        run(["virsh", "define", str(SCRATCH / "bench.xml")])
        stop()

    def cold() -> None:
        run(["virsh", "start", "bench"])
        call_agent()

    def stop() -> None:
        """And the daemon, which ends when nobody calls it, is there with what it asks QEMU once."""
        run(["virsh", "destroy", "bench"], check=False)
        run(["virsh", "domcapabilities", "--virttype=kvm", "--machine=q35"])

    def cleanup() -> None:
        run(["virsh", "destroy", "bench"], check=False)
        run(["virsh", "undefine", "bench"], check=False)

    return Way("`virsh start`, guest-exec (q35)", prepare, cold, call_agent, stop, cleanup)


def make_vmspawn() -> Way:
    """With the keys in the initrd's second archive, as a VM of vmsilo gets them."""
    running: list[subprocess.Popen[bytes]] = []
    key = SCRATCH / "key"
    argv = [
        *("systemd-vmspawn", "--quiet", "--machine=bench", "--console=read-only", "--firmware=none"),
        *(
            f"--cpus={CPUS}",
            f"--ram={MEMORY}M",
            "--kvm=yes",
            "--tpm=no",
            "--vsock=yes",
            f"--vsock-cid={CID}",
        ),
        *(
            "--pass-ssh-key=no",
            "--register=no",
            "--console-transport=virtio",
            f"--image={SCRATCH / 'root.erofs'}",
            f"--linux={SCRATCH / 'vmlinuz'}",
        ),
        # Else vmspawn looks for a partition table.
        *(f"--initrd={SCRATCH / 'initrd-keys'}", "root=/dev/vda", *ROOT.split(), *PARAMS.split()),
    ]

    def prepare() -> None:
        if shutil.which(argv[0]) is None:
            raise Unusable(f"{argv[0]} is not in PATH")
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)])
        sys.path.insert(0, "/usr/local/lib/vmsilo/daemon")
        from vmsilo_image.cpio import SshKeys, secret_archive

        keys = SshKeys(key.read_bytes(), {USER: key.with_suffix(".pub").read_bytes()})
        initrd = (SCRATCH / "initrd").read_bytes()
        (SCRATCH / "initrd-keys").write_bytes(initrd + secret_archive(os.urandom(32).hex(), keys))

    def connects() -> bool:
        if running[0].poll() is not None:
            raise Unusable(f"systemd-vmspawn ended with {running[0].returncode}: {read_log()}")
        return run([*ssh, f"{USER}@vsock/{CID}", "true"], check=False).returncode == 0

    def cold() -> None:
        with (SCRATCH / "vmspawn.log").open("wb") as log:
            running[:] = [subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)]
        try:
            retry(connects)
        except Unusable as error:
            raise Unusable(f"{error}; {read_log()}") from error

    def read_log() -> str:
        return (SCRATCH / "vmspawn.log").read_text(errors="replace").strip()[-300:]

    def stop() -> None:
        while running:
            process = running.pop()
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    ssh = ["ssh", "-i", str(key), "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
    return Way(
        "`systemd-vmspawn`, ssh over vsock (q35)",
        prepare,
        cold,
        lambda: retry(connects),
        stop,
        stop,
    )


def measure_cold(way: Way) -> None:
    way.stop()
    begin = time.monotonic()
    way.cold()
    way.cold_times.append(time.monotonic() - begin)
    print(f"{way.name}: cold {way.cold_times[-1]:.1f} s", file=sys.stderr, flush=True)


def measure_warm(way: Way, calls: int) -> None:
    time.sleep(SETTLE_SECONDS)  # what the guest still starts after its agent
    way.warm()
    for _ in range(calls):
        begin = time.monotonic()
        way.warm()
        way.warm_times.append(time.monotonic() - begin)
    print(
        f"{way.name}: warm {sorted(way.warm_times)[len(way.warm_times) // 2]:.2f} s",
        file=sys.stderr,
        flush=True,
    )


def guarded(way: Way, step: Callable[[], None]) -> None:
    """Once it has failed, no more of it is tried."""
    if not way.why_not:
        try:
            step()
        except (OSError, Unusable, subprocess.TimeoutExpired) as error:
            way.why_not = str(error) or repr(error)
            print(f"{way.name}: {way.why_not}", file=sys.stderr, flush=True)


def copy_image() -> None:
    shutil.rmtree(SCRATCH, ignore_errors=True)  # of a time when the lab crashed
    SCRATCH.mkdir(parents=True)
    source = Path(run(["vmsilo", "image", "path", "bench"]).stdout.strip())
    for name in ("vmlinuz", "initrd", "root.erofs"):
        shutil.copyfile(source / name, SCRATCH / name)


def make_ways() -> list[Way]:
    qemu = 'vmm = "qemu"\n[qemu]\nmachine = "{}"\n'
    crosvm, cloud_hypervisor = 'vmm = "crosvm"\n', 'vmm = "cloud-hypervisor"\n'
    return [
        make_vmsilo("bench-q35", "`vm-run`, QEMU q35", "qemu-system-x86_64", qemu.format("q35")),
        make_virsh(),
        make_vmspawn(),
        make_vmsilo("bench-microvm", "`vm-run`, QEMU microvm", "qemu-system-x86_64", qemu.format("microvm")),
        make_vmsilo("bench-crosvm", "`vm-run`, crosvm", "crosvm", crosvm),
        make_vmsilo("bench-ch", "`vm-run`, cloud-hypervisor", "cloud-hypervisor", cloud_hypervisor),
    ]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ["LC_ALL"] = "C.UTF-8"
    ways = make_ways()
    if sys.argv[1:] == ["names"]:
        print(json.dumps([way.name for way in ways]))
        return
    way, calls = ways[int(sys.argv[1])], int(sys.argv[2])
    copy_image()
    try:
        guarded(way, way.prepare)
        guarded(way, partial(measure_cold, way))
        guarded(way, partial(measure_warm, way, calls))
        guarded(way, way.stop)
    finally:
        way.cleanup()
        shutil.rmtree(SCRATCH)
    print(json.dumps({"cold": way.cold_times, "warm": way.warm_times, "why_not": way.why_not}))


if __name__ == "__main__":
    main()
