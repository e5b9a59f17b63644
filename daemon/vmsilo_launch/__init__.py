"""The launcher: what a VM's unit runs before it becomes the VMM. Standard library only."""
