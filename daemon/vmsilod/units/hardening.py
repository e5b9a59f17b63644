"""Sandbox settings of the generated units, with the reason for every one that had to be left out.

Used by `render.py` only; text, no logic.
"""

from __future__ import annotations

_EVERY = """\
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
# All sockets are Unix sockets or arrive as open descriptors.
PrivateNetwork=yes
PrivateIPC=yes
RestrictAddressFamilies=AF_UNIX
RestrictSUIDSGID=yes
RestrictRealtime=yes
LockPersonality=yes
SystemCallArchitectures=native
ProtectKernelModules=yes
ProtectControlGroups=yes
ProtectClock=yes
"""

_NO_NAMESPACES = """\
ProtectProc=invisible
ProtectKernelTunables=yes
ProtectKernelLogs=yes
ProtectHostname=yes
RestrictNamespaces=yes
SystemCallErrorNumber=EPERM
"""

VMM_EVERY = f"""\
{_EVERY}# Not PrivateDevices=: it would hide /dev/kvm. Everything else comes as an open descriptor.
DevicePolicy=closed
DeviceAllow=/dev/kvm rw
# Not MemoryDenyWriteExecute=: QEMU's TCG writes the code that it runs.
"""

VMM_SANDBOXED_BY_ITSELF = """\
# crosvm puts each device into user, pid, mount and network namespaces of its own, with a seccomp filter
# per device. RestrictNamespaces= and SystemCallFilter= would refuse the calls that this takes, and
# crosvm would abort. ProtectKernelTunables=, ProtectKernelLogs=, ProtectHostname= and ProtectProc= are
# left out as well: they mount over parts of /proc, and the kernel refuses a new proc mount in a user
# namespace whose own /proc is covered in part (mount_too_revealing() in fs/namespace.c). That the jail
# mounts one is inferred, not observed.
"""

VMM_SANDBOXED_BY_SYSTEMD = f"""\
# QEMU has no jail of its own: all of it is this.
{_NO_NAMESPACES}SystemCallFilter=@system-service seccomp
SystemCallFilter=~@privileged
"""

VMM_LIBUSB = """\
# QEMU's libusb does not start without a socket on which it hears of devices. In a network namespace
# of its own this shows it the kernel's events, and no network. Devices come as open descriptors.
RestrictAddressFamilies=AF_NETLINK
"""

VMM_INET = """\
# crosvm asks for the MTU of each TAP over an internet socket and does not start without an answer. In a
# network namespace of its own it finds there a stand-in of the TAP's name, and no network.
RestrictAddressFamilies=AF_INET
"""

VMM_SANDBOXED_BY_BOTH = f"""\
# cloud-hypervisor filters the system calls of each of its threads and closes the file system with Landlock;
# what it is before it does so, and a thread that it forgot, are held by this.
{_NO_NAMESPACES}MemoryDenyWriteExecute=yes
SystemCallFilter=@system-service seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self
# umask: it sets its own to 0077 before it makes the vsock socket, to which vmsilo-relayd, in the directory's
# group, could then not connect. It does not mind that the call fails.
SystemCallFilter=~@privileged umask
"""

HELPER = f"""
{_EVERY}PrivateDevices=yes
DevicePolicy=closed
MemoryDenyWriteExecute=yes
{_NO_NAMESPACES}SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
"""

# ProtectSystem= would be another mount of "/", and systemd keeps only one of the two
# (TemporaryFileSystem=/). There is no /home to protect, and no place to write is wanted.
_NO_HOST = "".join(
    line
    for line in _EVERY.splitlines(keepends=True)
    if not line.startswith(("ProtectSystem=", "ProtectHome=", "PrivateTmp="))
)

SHARE = f"""\
{_NO_HOST}PrivateDevices=yes
DevicePolicy=closed
MemoryDenyWriteExecute=yes
# The processes of the user whose files it serves are not its own: it sees none of them. (systemd 257; an
# older one says that it does not know the line.)
PrivatePIDs=yes
{_NO_NAMESPACES}# virtiofsd filters its system calls itself, more closely; this holds what it is before it
# does so. unshare: each of its threads has a working directory of its own; new namespaces are refused above.
# vmsilo-share adds Landlock.
SystemCallFilter=@system-service unshare
SystemCallFilter=landlock_create_ruleset landlock_add_rule landlock_restrict_self
SystemCallFilter=~@privileged @resources
SystemCallFilter=@chown
"""

HOME_MAKER = f"""
{_EVERY}# It may be below /home.
ProtectHome=no
PrivateDevices=yes
DevicePolicy=closed
MemoryDenyWriteExecute=yes
{_NO_NAMESPACES}SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
"""
