"""`make demo`: builds the container host and a guest image, installs vmsilo there as a user would, and shows
it at work.

Every line behind a `$` or `#` is a command that runs in that host as the desktop user or as root, with its
real output.
"""

from __future__ import annotations

import signal
import sys
import time

from hosts import layers
from hosts.container import Container
from hosts.transcript import Transcript

VM = """\
# /etc/vmsilo/vms.d/demo.toml
memory = 1024
cpus = 2
color = "#2ecc71"
"""


def main() -> int:
    layers.enter_private_mounts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin = time.monotonic()
    with Container() as host:
        layers.say(
            f"the test host is up after {time.monotonic() - begin:.0f} s: systemd, D-Bus, polkit; no network"
        )
        host.configure(demo=VM)
        transcript = Transcript(lambda command, user: host.argv(["bash", "-c", command], user=user))
        show = transcript.show
        show("cat /etc/vmsilo/vmsilo.toml /etc/vmsilo/vms.d/demo.toml", user="root")
        show("vmsilo image list", user="root")
        show("vmsilo check")
        show("vmsilo list")
        show("vm-run demo uname -a    # cold: this starts the VM")
        show("vm-run demo uname -a    # warm")
        show("printf 'one\\ntwo\\nthree\\n' | vm-run demo sort -r | tac")
        show("vm-run demo sh -c 'echo to stdout; echo to stderr >&2; exit 42' 2>/dev/null", expect=42)
        show("vm-run demo no-such-program", expect=127)
        show("vm-run demo id; vm-run --root demo id")
        show("vm-run dmo true", expect=125)
        show("vmsilo list")
        show("systemctl status --no-pager vmsilo-demo-vm.service | cut -c1-160")
        show(
            "grep -E '^(Name|Uid|CapEff|CapBnd|NoNewPrivs|Seccomp):' "
            "/proc/$(systemctl show -P MainPID vmsilo-demo-vm)/status"
        )
        show(
            "setpriv --reuid=mallory --regid=mallory --clear-groups vm-run demo true",
            user="root",
            expect=125,
        )
        show("vm-stop demo")
        show("vmsilo list")
        show("systemctl is-active vmsilo-demo-vm.service vmsilo-demo.socket")
        show("journalctl --no-pager -q -p warning -u 'vmsilo*' -o cat | cut -c1-160", user="root")
    return transcript.close()


if __name__ == "__main__":
    sys.exit(main())
