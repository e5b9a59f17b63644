"""The cached layers of the container host: Debian packages, vmsilo installed, a guest image. Each keyed by
what it is made of.

Called by the container and the demo, as root. A layer is built beside its place and renamed when it is
whole; builders of the same layer wait for one another. Lives in .cache until `make clean`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

REPO = Path(__file__).resolve().parents[2]
CACHE = REPO / ".cache"
HOST_SUITE = os.environ.get("VMSILO_TEST_SUITE", "trixie")
HOST_PACKAGES = [
    "systemd",
    "systemd-sysv",
    "dbus",
    "polkitd",
    "python3",
    "python3-venv",
    "python3-gi",
    "python3-pydbus",
    "python3-systemd",
    "python3-cairo",
    "gir1.2-glib-2.0",
    "iproute2",
    "procps",
    "util-linux",
    "nftables",
    "qemu-system-x86",
    "make",
    "mmdebstrap",
    "erofs-utils",
    "e2fsprogs",
    "strace",
    "less",
    "ca-certificates",
    "sudo",
    "openssh-client",
    *(["virtiofsd"] if HOST_SUITE != "bookworm" else []),
]
# Other programs with rules of their own, for tests of living beside them; none runs unless a test starts it.
FIREWALL_PACKAGES = ["docker.io", "firewalld", "ufw"]
FIREWALL_UNITS = [
    "containerd.service",
    "docker.service",
    "docker.socket",
    "firewalld.service",
    "ufw.service",
]
# vhost-device-vsock stands in for the kernel's vhost-vsock, which a container on a bare kernel does not
# have.
DEVICE_SUITE = "forky"
DEVICE_PACKAGE = "vhost-device-vsock"
INSTALLED_FROM = (
    "Makefile",
    "pyproject.toml",
    "README.md",
    "daemon",
    "client",
    "guest",
    "systemd",
    "polkit",
    "docs",
)
IMAGE_FROM = ("daemon/vmsilo_image", "guest")
USER = "user"  # the desktop user of the test host, uid 1000


def say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


def digest(*parts: str, files: Iterable[str] = ()) -> str:
    """A key of 16 hex digits over texts and the contents of files and folders of the repository."""
    value = hashlib.sha256("\0".join(parts).encode())
    for name in files:
        top = REPO / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                value.update(f"{path.relative_to(REPO)}\0{path.stat().st_mode & 0o111}\0".encode())
                value.update(path.read_bytes())
    return value.hexdigest()[:16]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def making(target: Path) -> Iterator[Path | None]:
    """Yields a fresh folder to fill, renamed to `target` at the end; None when target is there already."""
    with locked(target.with_name(f".{target.name}.lock")):
        if target.exists():
            yield None
            return
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def drop_older(target: Path) -> None:
    """Remove other versions of a layer, so that the cache does not grow with every change of the source.

    One that a running host is mounted on stays, for the next to remove.
    """
    prefix = target.name.rsplit("-", 1)[0]
    for other in target.parent.glob(f"{prefix}-*"):
        if other != target:
            with (
                contextlib.suppress(BlockingIOError, FileNotFoundError),
                using(other, fcntl.LOCK_EX | fcntl.LOCK_NB),
            ):
                shutil.rmtree(other, ignore_errors=True)


@contextmanager
def using(layer: Path, lock: int = fcntl.LOCK_SH) -> Iterator[None]:
    """As long as somebody does, nobody removes the layer."""
    descriptor = os.open(layer, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, lock)
        yield
    finally:
        os.close(descriptor)


def run_logged(argv: list[str], log: Path, *, env: dict[str, str] | None = None) -> None:
    """Run a build step; its output is kept in `log` and shown only when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env, check=False
        )
    if done.returncode:
        sys.stderr.write(log.read_text(errors="replace")[-4000:])
        raise SystemExit(f"{argv[0]} failed with {done.returncode}; its whole output is in {log}")


def run_shown(argv: list[str]) -> None:
    """Run a build step and show what it says, but for systemd-nspawn's complaint about a folder."""
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Attempted to remove disk file system" not in line:
                print(line, end="", file=sys.stderr, flush=True)
    if process.returncode:
        raise SystemExit(f"{argv[-4:]} failed with {process.returncode}")


def make_base() -> Path:
    """Debian with all packages; no vmsilo yet. About 1.2 GB."""
    packages = [*HOST_PACKAGES, *FIREWALL_PACKAGES]
    target = CACHE / "hosts" / f"base-{digest(HOST_SUITE, DEVICE_SUITE, DEVICE_PACKAGE, *packages)}"
    with making(target) as partial:
        if partial is not None:
            say(f"building the test host's root: Debian {HOST_SUITE}, {len(packages)} packages")
            include = ",".join(packages)
            root = partial / "root"
            run_logged(
                ["mmdebstrap", "--variant=minbase", f"--include={include}", HOST_SUITE, str(root)],
                CACHE / "logs" / "base.log",
            )
            device = partial / "device"
            # A testing suite's Release file runs out while nobody refreshes a mirror's snapshot.
            options = ["--variant=extract", '--aptopt=Acquire::Check-Valid-Until "false"', "--mode=root"]
            run_logged(
                ["mmdebstrap", *options, f"--include={DEVICE_PACKAGE}", DEVICE_SUITE, str(device)],
                CACHE / "logs" / "device.log",
            )
            shutil.copy2(device / "usr/bin" / DEVICE_PACKAGE, root / "usr/bin" / DEVICE_PACKAGE)
            shutil.rmtree(device)
            subprocess.run(["systemctl", f"--root={root}", "-q", "disable", *FIREWALL_UNITS], check=True)
            finish_root(root)
            fetch_wheels(partial / "wheels", root)
    drop_older(target)
    return target


def finish_root(root: Path) -> None:
    """The accounts and settings of an ordinary desktop machine."""
    (root / "etc/hostname").write_text("testhost\n")
    (root / "etc/machine-id").write_text("")
    enter = ["chroot", str(root)]
    for name, uid in ((USER, "1000"), ("mallory", "1001")):
        subprocess.run([*enter, "useradd", "-m", "-s", "/bin/bash", "-u", uid, name], check=True)


def fetch_wheels(wheels: Path, root: Path) -> None:
    """The Python packages that `make install` takes from PyPI, for the container that has no network."""
    wheels.mkdir()
    version = subprocess.check_output(
        ["chroot", str(root), "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        text=True,
    ).strip()
    names = ["pydantic>=2.10,<3", "pyroute2>=0.7.2,<0.10", "inotify-simple>=1.3.5,<3", "jeepney>=0.8"]
    run_logged(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--only-binary=:all:",
            f"--python-version={version}",
            *(f"--dest={wheels}", *names),
        ],
        CACHE / "logs" / "wheels.log",
    )


def copy_sources(target: Path) -> None:
    """What `make install` takes, into a new folder."""
    target.mkdir()
    for part in INSTALLED_FROM:
        path = REPO / part
        if path.is_dir():
            shutil.copytree(path, target / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(path, target / part)


def make_installed(base: Path, name: str = "installed", then: str = "true") -> Path:
    """The difference that `make install`, and the shell command `then`, make on a root: an overlay's upper
    folder.
    """
    target = CACHE / "hosts" / f"{name}-{digest(base.name, then, files=INSTALLED_FROM)}"
    with making(target) as partial:
        if partial is not None:
            say(f"installing vmsilo in the {name.removesuffix('installed') or 'test '}host: make install")
            source = partial / "source"
            copy_sources(source)
            (partial / "upper").mkdir()
            with mounted([base / "root"], partial / "upper", partial / "work") as merged:
                run_logged(
                    nspawn(
                        merged,
                        f"--bind-ro={source}:/root/vmsilo",
                        f"--bind-ro={base / 'wheels'}:/root/wheels",
                        "--setenv=PIP_NO_INDEX=1",
                        "--setenv=PIP_FIND_LINKS=/root/wheels",
                        "--chdir=/root/vmsilo",
                        *("sh", "-c", f"make install && {then}"),
                    ),
                    CACHE / "logs" / f"{name}.log",
                )
            shutil.rmtree(source)
            shutil.rmtree(partial / "work", ignore_errors=True)
    drop_older(target)
    return target


def make_images(base: Path, installed: Path, image: str = "default", recipe: str = "") -> Path:
    """An images folder with that image, built inside the host by `vmsilo image build`; `recipe` is a file of
    the repository, where vmsilo has none of that name."""
    name = "images" if image == "default" else f"images_{image}"
    recipes = [recipe] if recipe else []
    key = digest(HOST_SUITE, image, files=[*IMAGE_FROM, *recipes])
    target = CACHE / "hosts" / f"{name}-{key}"
    with making(target) as partial:
        if partial is not None:
            say(f"building the guest image in the test host: vmsilo image build {image}")
            scratch = target.with_name(f".{name}-scratch")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                with mounted(
                    [installed / "upper", base / "root"], scratch / "upper", scratch / "work"
                ) as merged:
                    binds = [f"--bind={partial}:/var/lib/vmsilo/images"]
                    command = ["vmsilo", "image", "build", image]
                    if recipe:
                        binds.append(f"--bind-ro={REPO / recipe}:/root/{image}.toml")
                        command.append(f"--recipe=/root/{image}.toml")
                    run_shown(nspawn(merged, *binds, *command))
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    drop_older(target)
    return target


@contextmanager
def mounted(lower: list[Path], upper: Path, work: Path) -> Iterator[Path]:
    """An overlay of folders, in this process's own mount namespace (see `enter_private_mounts`)."""
    for folder in (upper, work):
        folder.mkdir(exist_ok=True)
    merged = work.with_name(work.name + "-merged")
    merged.mkdir(exist_ok=True)
    options = f"lowerdir={':'.join(map(str, lower))},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], check=True)
    try:
        yield merged
    finally:
        subprocess.run(["umount", "-l", str(merged)], check=False)
        merged.rmdir()


def nspawn(root: Path, *arguments: str) -> list[str]:
    """A command in a root with the machine's network, nothing booted; dies with us."""
    return [
        *("setpriv", "--pdeathsig", "KILL", "systemd-nspawn", "--quiet", "--register=no", "--keep-unit"),
        *("--as-pid2", "--capability=all", "--resolv-conf=copy-host", "--console=pipe", "-D", str(root)),
        *arguments,
    ]


def enter_private_mounts() -> None:
    """Go on in a mount namespace of our own: whatever ends this process, its mounts end with it."""
    if os.environ.get("VMSILO_TEST_MOUNTS") == str(os.getpid()):
        return
    os.environ["VMSILO_TEST_MOUNTS"] = str(os.getpid())  # unshare(1) executes in place: the PID stays
    # -m SCRIPT becomes its path in sys.argv: run the same module again.
    spec = sys.modules["__main__"].__spec__
    assert spec is not None
    name = spec.parent if spec.name.endswith(".__main__") else spec.name
    os.execvp("unshare", ["unshare", "--mount", sys.executable, "-m", str(name), *sys.argv[1:]])
