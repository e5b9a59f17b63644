"""A fast stand-in for VMM, vsock device and guest kernel, for tests of the host: a VM boots in a fraction of
a second.

Fake at the edge: systemd, units, launcher, vmsilod, relayd, clients and the guest agent are the real ones.
"""
