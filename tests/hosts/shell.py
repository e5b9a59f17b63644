"""`make shell`: a root shell in a booted container host with vmsilo installed and one VM, demo,
configured.
"""

from __future__ import annotations

import subprocess

from hosts.container import Container
from hosts.layers import enter_private_mounts


def main() -> None:
    enter_private_mounts()
    with Container() as host:
        host.configure(demo="memory = 1024\n")
        subprocess.run(host.argv(["bash", "-l"]), check=False)


if __name__ == "__main__":
    main()
