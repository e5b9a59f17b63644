"""`make demo-lab`: boots the lab, a whole virtual host with KVM, and shows vmsilo at work in it: a VM's uid
and rights, a NIC passed through, a shared IOMMU group refused, a serial login.

Every line behind a `$` or `#` is a command that runs in that host as the desktop user or as root, with its
real output.
"""

from __future__ import annotations

import signal
import sys
import time

from hosts import layers
from hosts.lab import prepare
from hosts.lab_layers import make_lab
from hosts.lab_machine import Lab
from hosts.transcript import Transcript

NIC = "00:11.0"
SHARED = "00:1f.2"
VMS = {
    "banking": "memory = 640\n",
    "net": f'memory = 768\nimage = "hardware"\npci_devices = [{{ path = "{NIC}" }}]\n',
    "disk": f'memory = 640\nimage = "hardware"\npci_devices = [{{ path = "{SHARED}" }}]\n',
}
STATUS = (
    "grep -E '^(Name|Uid|CapEff|CapBnd|NoNewPrivs|Seccomp):'"
    " /proc/$(systemctl show -P MainPID vmsilo-banking-vm)/status"
)
# What a person would type at the serial login: Ctrl-] (octal 35) leaves.
LOGIN = (
    r"(sleep 4; printf '\n'; sleep 2; printf 'tty; id -un\n'; sleep 4; printf '\035')"
    r" | script -qec 'vm-shell banking' /dev/null"
)


def main() -> int:
    layers.enter_private_mounts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin = time.monotonic()
    with Lab(make_lab()) as lab:
        layers.say(f"the lab is up after {time.monotonic() - begin:.0f} s ({lab.accelerator} below its KVM)")
        prepare(lab)
        for name, text in VMS.items():
            lab.run(f"cat > /etc/vmsilo/vms.d/{name}.toml", input=text)
        lab.run("busctl call org.vmsilo1 /org/vmsilo1 org.vmsilo1.Manager Reload")
        transcript = Transcript(lambda command, user: lab.ssh(command, user=user))
        show_all(transcript)
    return transcript.close()


def show_all(transcript: Transcript) -> None:
    show = transcript.show
    show("uname -rv; ls -l /dev/kvm /dev/vhost-vsock; cat /etc/vmsilo/vms.d/net.toml")
    show("vm-run banking uname -a    # cold, on KVM, over kernel vsock")
    show("vm-run banking uptime -p    # warm")
    show("systemctl status --no-pager -n 0 vmsilo-banking-vm.service | cut -c1-150")
    show(STATUS)
    show("systemctl show -P DevicePolicy -P DeviceAllow vmsilo-banking-vm")
    show(LOGIN)
    show(
        "journalctl -q --no-pager -o cat -u vmsilo-banking-vm -g '^console:' | tail -n 5 | cut -c1-120",
        user="root",
    )
    show("vm-shell --ssh banking id")
    show("vmsilo pci list")
    # QEMU's emulated IOMMU does not remap interrupts, which vmsilo refuses until that is accepted.
    show("vm-start net", expect=1)
    accepted = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
    show(f"modprobe vfio_iommu_type1 && echo Y > {accepted}", user="root")
    show("vm-run net sh -c 'ip -br link; cat /sys/class/net/e*/address'    # the NIC leaves the host here")
    show("vmsilo pci list")
    show(
        "vm-run disk true    # its SATA controller shares an IOMMU group with the host's chipset", expect=125
    )
    show("vmsilo usb list")
    show("vm-stop net && vm-stop banking && vmsilo list")
    show("journalctl --no-pager -q -p warning -u 'vmsilo*' -o cat | cut -c1-160", user="root")


if __name__ == "__main__":
    sys.exit(main())
