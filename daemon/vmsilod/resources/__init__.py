"""What a running VM holds of the host: run-time directory, vsock channel, image descriptors, and the
record of it all.
"""
