"""`make lab-shell`: a root shell in the booted lab, with vmsilo started and one VM, demo, configured.

`python -m hosts.lab_shell --keep FILE` writes a script that runs a command in the lab into FILE and keeps
the lab until FILE is removed, for whoever works on something that a container cannot show.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from hosts import layers
from hosts.lab import prepare
from hosts.lab_layers import make_lab
from hosts.lab_machine import Lab


def keep(lab: Lab, path: Path) -> None:
    ssh = shlex.join(lab.ssh("COMMAND")[:-1])
    path.write_text(f'#!/bin/sh\n# runs a shell command in the lab\nexec {ssh} "$@"\n')
    path.chmod(0o700)
    layers.say(f"kept until {path} is removed")
    while path.exists():
        time.sleep(1)


def main() -> None:
    layers.enter_private_mounts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with Lab(make_lab()) as lab:
        prepare(lab)
        lab.run("printf 'memory = 768\\n' > /etc/vmsilo/vms.d/demo.toml")
        if sys.argv[1:2] == ["--keep"]:
            keep(lab, Path(sys.argv[2]))
        else:
            subprocess.run(lab.ssh("", "-t"), check=False)


if __name__ == "__main__":
    main()
