"""Images in huge pages: one copy in the host's memory for all VMs of an image; see docs/hugepages.md."""
