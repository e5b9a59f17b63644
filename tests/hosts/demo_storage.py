"""`make demo-storage`: what a real guest keeps and what it does not: a fresh root at each start, a shared
home, a disk, persistent paths, disposables, and a command wrapped in a VM around the current directory.

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

SETTINGS = """\
# /etc/vmsilo/vmsilo.toml
user = "user"
"""
WORK = """\
# /etc/vmsilo/vms.d/work.toml
memory = 768
cpus = 1
root_overlay.size = "2G"
persist = ["/etc/ssh"]
shared_directories = [{ path = "/srv/papers", tag = "papers", readonly = true }]

[[additional_disks]]
path = "/srv/data.img"
id = "data"
mount = "/data"
create = { size = "256M", filesystem = "ext4" }
"""
PREPARED = """
set -e
echo 'export EDITOR=nano' > /var/lib/vmsilo/home-template/.profile
chown user: /var/lib/vmsilo/home-template/.profile
mkdir -p /srv/papers
echo 'read me' > /srv/papers/paper
mkdir -p /home/user/project
printf 'all:\\n\\tuname -n > built-in\\n\\tid -u >> built-in\\n' > /home/user/project/Makefile
chown -R user: /home/user
"""
PROJECT = "cd ~/project &&"


def main() -> int:
    layers.enter_private_mounts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin = time.monotonic()
    with Container() as host:
        layers.say(f"the test host is up after {time.monotonic() - begin:.0f} s")
        host.run(["bash", "-c", PREPARED])
        host.configure(settings=SETTINGS, work=WORK)
        transcript = Transcript(lambda command, user: host.argv(["bash", "-c", command], user=user))
        show_persistence(transcript)
        show_disposables(transcript)
        show_images(transcript)
        transcript.show("journalctl --no-pager -q -p warning -u 'vmsilo*' -o cat | cut -c1-160", user="root")
    return transcript.close()


def show_persistence(transcript: Transcript) -> None:
    show = transcript.show
    show("cat /etc/vmsilo/vms.d/work.toml", user="root")
    show("vmsilo check && vm-run work df -hT / /home/user /data /mnt/papers")
    show("vm-run work sh -c 'ls -A; echo a secret > note; echo kept > /data/file'")
    show("vm-run work sh -c 'cat /mnt/papers/paper; echo x > /mnt/papers/paper'", expect=2)
    show("ls -l /shared/work    # the desktop user's, on both sides")
    show(
        "vm-run --root work sh -c 'echo marker-of-the-demo > /etc/marker; ssh-keygen -A; ls /etc/ssh; sync'"
    )
    show("vmsilo disk list work")
    show("vmsilo disk grow work data 1G && vm-run work df -h /data", user="root")
    show(
        "systemctl kill -s KILL vmsilo-work-vm; sleep 2; grep -rl marker-of-the-demo /var/lib/vmsilo",
        user="root",
        expect=1,
    )
    show("vm-run work sh -c 'cat note /data/file; ls /etc/ssh; cat /etc/marker'    # a fresh root", expect=1)


def show_disposables(transcript: Transcript) -> None:
    show = transcript.show
    show("vm-run --disposable work sh -c 'uname -n; ls -A; touch mine'")
    show(f"{PROJECT} ls -l")
    show(f"{PROJECT} vm-run --here sh -c 'pwd; uname -n > built-in; id -u >> built-in; ip -br link'")
    show(f"{PROJECT} ls -l && cat built-in    # made in the VM, the user's own")
    show(f"{PROJECT} vm-run --here --ro touch other", expect=1)
    show("sleep 5; vmsilo list    # none is left")


def show_images(transcript: Transcript) -> None:
    show = transcript.show
    show("vmsilo image list", user="root")
    show("vm-stop work; vmsilo status work", expect=3)


if __name__ == "__main__":
    sys.exit(main())
