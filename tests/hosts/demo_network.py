"""`make demo-network`: three real guests in the container host, and what each of them reaches: the internet
through NAT, another VM on a VM-to-VM network, and nothing else.

Every line behind a `$` or `#` is a command that runs in that host as the desktop user or as root, with its
real output. The internet is a namespace with one web server.
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
shared_home = false
[host_networking.nat]
enable = true
interface = "uplink"
"""
WAN = """\
[network.interfaces.wan]
tap.host_address = "10.77.{number}.254/24"
addresses = ["10.77.{number}.1/24"]
routes."0.0.0.0/0" = {{ via = "10.77.{number}.254" }}
"""
INNER = """\
[network.interfaces.inner]
type = "vm-switch"
vm_network.name = "inner"
addresses = ["10.88.0.{number}/24"]
"""
SMALL = "memory = 640\ncpus = 1\n"
VMS = {
    "one": SMALL + WAN.format(number=1) + INNER.format(number=1),
    "two": SMALL + WAN.format(number=2) + INNER.format(number=2),
    "lone": SMALL + INNER.format(number=3),
}
# The host's next hop, in its own network, and a server behind that: documentation addresses (RFC 5737).
ROUTER, SERVER = "203.0.113.1", "198.51.100.1"
WORLD = f"""
set -e
ip netns add world
ip link add uplink type veth peer name eth0 netns world
ip addr add 203.0.113.2/24 dev uplink
ip link set uplink up
ip route add default via {ROUTER}
ip -n world addr add {ROUTER}/24 dev eth0
ip -n world addr add {SERVER}/32 dev lo
ip -n world link set eth0 up
ip -n world link set lo up
mkdir -p /srv/world
echo 'hello from the internet' > /srv/world/index.html
systemd-run -q --unit=world -p NetworkNamespacePath=/run/netns/world \\
    python3 -u -m http.server -d /srv/world 80
"""


def fetch(vm: str, address: str) -> str:
    return f"vm-run {vm} busybox wget -T 5 -qO- http://{address}/"


def main() -> int:
    layers.enter_private_mounts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin = time.monotonic()
    with Container() as host:
        layers.say(f"the test host is up after {time.monotonic() - begin:.0f} s")
        host.run(["bash", "-c", WORLD])
        host.configure(settings=SETTINGS, **VMS)
        transcript = Transcript(lambda command, user: host.argv(["bash", "-c", command], user=user))
        show_all(transcript)
    return transcript.close()


def show_all(transcript: Transcript) -> None:
    show = transcript.show
    show("cat /etc/vmsilo/vmsilo.toml /etc/vmsilo/vms.d/one.toml", user="root")
    show("vmsilo check && ip -br address", user="root")
    show("for vm in one two lone; do vm-start --wait $vm; done; vmsilo list")
    show("vm-run one ip -br address; vm-run one ip route")
    show(f"{fetch('one', SERVER)}    # through NAT")
    show("journalctl -u world -o cat -n 1 --no-pager    # who came: the host's address", user="root")
    show(f"{fetch('one', ROUTER)}    # the same server, by its address in the host's own network", expect=1)
    show("vm-run --detach two python3 -m http.server 8000")
    show(f"sleep 3; {fetch('one', '10.88.0.2:8000')} | head -n 3    # the same VM-to-VM network")
    show(f"{fetch('one', '10.77.2.1:8000')}    # the same VM, by its TAP", expect=1)
    show("vm-run lone ip route")
    show(f"{fetch('lone', '10.88.0.2:8000')} | head -n 3")
    show(f"{fetch('lone', SERVER)}    # nothing else", expect=1)
    show("python3 -m http.server -d /srv/world 8080 >/dev/null 2>&1 &", user="root")
    show(f"{fetch('one', '10.77.1.254:8080')}    # not the host either", expect=1)
    show("vmsilo status one")
    show("nft list table inet vmsilo | head -n 60", user="root")
    show("vm-stop one; vm-stop two; vm-stop lone")
    show("journalctl --no-pager -q -p warning -u 'vmsilo*' -o cat | cut -c1-160", user="root")


if __name__ == "__main__":
    sys.exit(main())
