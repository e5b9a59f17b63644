"""vmsilo-relayd: owns each VM's command socket and vsock connections, and knows which guest is ready.

Runs as the user vmsilo without capabilities. Standard library only, and little of it: it stays resident for
as long as the host runs.
"""
