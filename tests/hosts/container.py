"""A booted container host: systemd as PID 1, system bus, polkit, vmsilo installed, no network; everything
written goes to RAM.

Used by tests, demo and bench, as root. A context manager: on the way out, by whatever way, the container is
ended and its mounts are gone (they are in our own mount namespace, and systemd-nspawn dies with us).
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hosts import layers

if TYPE_CHECKING:
    from types import TracebackType

BOOT_SECONDS = 60
STOP_SECONDS = 30
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
GLOBAL_CONFIG = 'user = "user"\nshared_home = false\n'  # what does not test shares need not wait for them

Result = subprocess.CompletedProcess[str]


class Container(AbstractContextManager["Container"]):
    """`run` executes in it, as root or as another user; `root` is its file tree seen from here,
    `wheels` what `make install` needs of the package index.
    """

    def __init__(self, *, with_image: bool = True) -> None:
        self._with_image = with_image
        self._stack = ExitStack()
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0
        self._scratch = Path()
        self._images: Path | None = None
        self.root = Path()
        self.wheels = Path()
        self.boot_log = Path()

    def __enter__(self) -> Container:
        with ExitStack() as stack:
            base = layers.make_base()
            installed = layers.make_installed(base)
            images = layers.make_images(base, installed) if self._with_image else None
            for layer in (base, installed, images):
                if layer is not None:
                    stack.enter_context(layers.using(layer))
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmsilo-host-")))
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "mode=755", "vmsilo-host", str(scratch)], check=True
            )
            stack.callback(subprocess.run, ["umount", "-l", str(scratch)], check=False)
            self.wheels = base / "wheels"
            self.boot_log = scratch / "boot.log"
            self.root = stack.enter_context(
                layers.mounted([installed / "upper", base / "root"], scratch / "upper", scratch / "work")
            )
            stack.callback(self._stop)
            self._scratch, self._images = scratch, images
            self._boot(scratch, images)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _boot(self, scratch: Path, images: Path | None) -> None:
        notify_path = scratch / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.boot_log.open("wb") as log:
            notify.bind(str(notify_path))
            notify.settimeout(BOOT_SECONDS)
            argv = [
                # systemd-nspawn that is killed leaves its container; as PID 1 of a namespace it does not.
                *("setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child=KILL"),
                *("--mount-proc", "systemd-nspawn", "-D", str(self.root), "--boot"),
                *(
                    "--register=no",
                    "--keep-unit",
                    "--capability=all",
                    "--private-network",
                    "--notify-ready=yes",
                ),
                *(
                    "--bind=/dev/net/tun",
                    "--console=pipe",
                    "--kill-signal=SIGRTMIN+3",
                    "--uuid=" + "0" * 31 + "1",
                ),
            ]
            if images is not None:
                argv.append(f"--bind={images}:/var/lib/vmsilo/images")
            environment = {"PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(notify_path)}
            self._nspawn = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
            while b"READY=1" not in notify.recv(4096).splitlines():
                pass
        self._leader = find_child(find_child(self._nspawn.pid))

    def _stop(self) -> None:
        nspawn, self._nspawn = self._nspawn, None
        if nspawn is None:
            return
        with contextlib.suppress(OSError, IndexError):
            os.kill(find_child(nspawn.pid), signal.SIGTERM)
        try:
            nspawn.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            nspawn.kill()
            nspawn.wait()

    def reboot(self) -> None:
        """Power off in order, and boot again from what is on disk."""
        self._stop()
        (self._scratch / "notify").unlink()
        self._boot(self._scratch, self._images)

    def argv(
        self, command: list[str], *, user: str = "root", env: dict[str, str] | None = None
    ) -> list[str]:
        """What runs `command` inside; a login-like environment, never ours."""
        variables = {"PATH": PATH, "LANG": "C.UTF-8", "TERM": os.environ.get("TERM", "dumb"), **(env or {})}
        home = "/root" if user == "root" else f"/home/{user}"
        inside = [
            "env",
            "-i",
            *(f"{key}={value}" for key, value in variables.items()),
            f"HOME={home}",
            *command,
        ]
        if user != "root":
            inside = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", *inside]
        return ["nsenter", "-t", str(self._leader), "-a", f"--wdns={home}", *inside]

    def run(self, command: list[str] | str, *, user: str = "root", **options: Any) -> Result:
        """Text in and out; a string is a shell command. `check` is on unless said otherwise."""
        argv = ["sh", "-c", command] if isinstance(command, str) else command
        options.setdefault("check", True)
        options.setdefault("timeout", 300)
        env = options.pop("env", None)
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        full = self.argv(argv, user=user, env=env)
        done: Result = subprocess.run(
            full, capture_output=True, text=True, errors="surrogateescape", **{**options, "check": False}
        )
        if options["check"] and done.returncode:
            raise AssertionError(
                f"{shlex.join(argv)} exited with {done.returncode}\n"
                f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            )
        return done

    def popen(self, command: list[str], *, user: str = "root", **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.argv(command, user=user), **options)

    def write(self, path: str, text: str, *, mode: int = 0o644) -> None:
        """A file of the host, as an administrator would put it there: complete at once."""
        self.run(["sh", "-c", f"install -D -m {mode:o} /dev/stdin {shlex.quote(path)}"], input=text)

    def configure(self, *, settings: str = GLOBAL_CONFIG, **vms: str) -> None:
        """Write the global file and one file per VM (underscores in names become dashes), then start
        vmsilo.
        """
        self.write("/etc/vmsilo/vmsilo.toml", settings)
        for name, text in vms.items():
            self.write(f"/etc/vmsilo/vms.d/{name.replace('_', '-')}.toml", text)
        self.run("systemctl enable --now vmsilod.socket vmsilo-relayd.socket vmsilod.service")

    def vms(self) -> dict[str, dict[str, Any]]:
        rows = json.loads(self.run(["vmsilo", "list", "--json"]).stdout)
        return {row["Name"]: row for row in rows}

    def wait_until(self, condition: str, *, seconds: float = 60) -> None:
        """Wait for a shell condition inside the host."""
        deadline = time.monotonic() + seconds
        while self.run(condition, check=False).returncode:
            if time.monotonic() > deadline:
                raise AssertionError(f"still not true after {seconds:g} s: {condition}")
            time.sleep(0.1)

    def kill_main(self, unit: str) -> None:
        """SIGKILL for the main process of a unit, if it has one, which is gone when this returns."""
        pid = self.run(["systemctl", "show", "-P", "MainPID", unit]).stdout.strip()
        self.run(["systemctl", "kill", "--kill-whom=main", "--signal=KILL", unit], check=False)
        if pid != "0":
            self.wait_until(f"test ! -e /proc/{pid}")

    def journal(self, *units: str, since: str = "") -> str:
        arguments = [argument for unit in units for argument in ("-u", unit)]
        return self.run(["journalctl", "--no-pager", "-o", "short-precise", *arguments]).stdout

    def copy_in(self, source: Path, path: str) -> None:
        shutil.copy2(source, self.root / path.lstrip("/"))


def find_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
