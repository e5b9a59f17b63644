"""USB devices of the host in running VMs: what is plugged in, whose it is, and how it gets there."""
