"""vmsilo-consoled: reads every VM's serial console, keeps its end, and shares it among the owner's clients.

Runs as the user vmsilo-console without capabilities. Standard library only, and little of it: it stays
resident for as long as the host runs. The generic parts (loop, packets, listeners) are the relay's.
"""
