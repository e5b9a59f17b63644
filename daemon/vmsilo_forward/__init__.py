"""vmsilo-forward: copies bytes between TCP ports of the host and those of one VM's guest.

One process per VM that has `forward_ports`, in a unit of its own that ends with the VM's, under a user of
its own. Standard library, the wire protocol and the relay's loop only.
"""
