"""Runs the programs a build is made of, so that none of them outlives the builder. Called by build and
rootfs.

Each program is the first process of a PID and mount namespace of its own, tied to the builder by the
parent-death signal: when the builder goes, kill -9 included, the kernel ends all of the program's
descendants and drops their mounts. Output goes to the build's log; the terminal belongs to progress.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

from .errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

PACKAGES = {
    "mmdebstrap": "mmdebstrap",
    "mkfs.erofs": "erofs-utils",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "chroot": "coreutils",
}
TIE = ("setpriv", "--pdeathsig", "KILL", "--")
OWN = ("unshare", "--mount", "--propagation", "private", "--pid", "--mount-proc", "--kill-child=KILL", "--")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# apt fetches through these where a site has them.
PROXIES = ("http_proxy", "https_proxy", "no_proxy")
ERROR = re.compile(r"^(?:E: |dpkg: error|.*[Ee]rror: |<E> erofs: |.*: fatal: )(.*)")


def check_tools() -> None:
    missing = [tool for tool in PACKAGES if shutil.which(tool, path=PATH) is None]
    if missing:
        packages = sorted({PACKAGES[tool] for tool in missing})
        verb = "is" if len(missing) == 1 else "are"
        raise ImageError(
            f"{', '.join(missing)} {verb} not installed", f"Install the packages {', '.join(packages)}."
        )


def run_tool(
    argv: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Runs `argv` to its end. ImageError with the first line that says why, where there is one."""
    reason = ""
    full_env = {"PATH": PATH, "LC_ALL": "C.UTF-8", **_proxies(), **(env or {})}
    with log.open("ab") as sink:
        sink.write(f"+ {' '.join(argv)}\n".encode())
        sink.flush()
        # A session of its own: Ctrl-C reaches the builder alone, which then ends the program.
        with subprocess.Popen(
            [*TIE, *OWN, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=full_env,
            start_new_session=True,
        ) as process:
            try:
                assert process.stdout is not None
                for raw in process.stdout:
                    sink.write(raw)
                    line = raw.decode(errors="replace").rstrip()
                    if not reason and ERROR.match(line):
                        reason = line
                    if on_line:
                        on_line(line)
            except BaseException:
                process.kill()
                raise
    if process.returncode:
        detail = f": {printable(reason)}" if reason else ""
        raise ImageError(f"{argv[0]} failed with status {process.returncode}{detail}")


def run_chroot(root: Path, argv: Sequence[str], log: Path) -> None:
    """Runs a program of the guest in the guest's root."""
    run_tool(["chroot", str(root), *argv], log)


def printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)[:300]


def _proxies() -> dict[str, str]:
    return {name: os.environ[name] for name in PROXIES if name in os.environ}
